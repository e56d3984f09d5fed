"""Records as the atproto SDK's typed models, on demand: most readers need no more than the JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from blueflow.errors import MissingExtraError

if TYPE_CHECKING:
    from blueflow.events import RepoOp


def model(op: RepoOp) -> Any:
    """Return the record of `op` as the SDK's model; None for a delete.

    What has no lexicon in the SDK, or does not fit it, comes back as the SDK's `DotDict`: records
    are written by anybody, and an odd one is no reason to stop a reader.

    Raises:
        MissingExtraError: the SDK is not installed.
    """
    if op.record is None:
        return None
    try:
        from atproto import models as sdk  # noqa: PLC0415 - it takes a second to import
        from atproto_client.models.dot_dict import DotDict  # noqa: PLC0415 - as above
    except ImportError as error:
        raise MissingExtraError("identity", "typed models") from error
    typed = sdk.get_or_create(op.record, strict=False)
    return DotDict(op.record) if typed is None else typed
