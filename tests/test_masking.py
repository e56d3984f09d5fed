from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blueflow.masking import mask_credentials

CANARY = "ss3cret"
# Whatever stands around the canary in one password or value. A second URL behind a space inside a
# password is a second URL to everybody.
AROUND = st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: "://" not in text)
WORD = st.text(st.characters(exclude_categories=["Cs", "Z", "Cc"]))
VALUE = WORD.filter(lambda text: "=" not in text)  # or it is the name of another parameter
SENTENCE = st.text(st.characters(exclude_categories=["Cs"]))
CALM = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="@=?&#;:"))


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("wss://user:pass@host/x", "wss://***@host/x"),
        ("wss://token@host", "wss://***@host"),
        ("wss://@host", "wss://***@host"),
        ("wss://user:p@ss@host", "wss://***@host"),
        ("wss://user:p?ss@host", "wss://***@host"),
        ("wss://us:pa/ss3cret@h", "wss://***@h"),
        ("wss://pa/ss3cret@h", "wss://***@h"),
        ("wss://us.er:pa/ss3cret@h", "wss://***@h"),
        ("wss://us:pa ss3cret@h", "wss://***@h"),
        ("wss://us:pa\nss3cret@h", "wss://***@h"),
        ("wss://us:p://ss3cret@h", "wss://***@h"),
        ("wss://us:12/ss3cret@h", "wss://***@h"),
        ("a wss://u:p@h and https://v:q@i/.", "a wss://***@h and https://***@i/."),
        ("'wss://u:p/w@h': no (https://v:q@i)", "'wss://***@h': no (https://***@i)"),
        ("no connection to wss://u:p w@h within 1 s", "no connection to wss://***@h within 1 s"),
        ("wss://bsky.network: ask me@host", "wss://***@host"),  # may be a user and a password
        ("me:hunter2@proxy:3128 is no proxy", "me:***@proxy:3128 is no proxy"),
    ],
)
def test_user_and_password_are_masked(text: str, masked: str) -> None:
    assert mask_credentials(text) == masked


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("wss://host/?token=abc&x=1", "wss://host/?token=***&x=***"),
        ("wss://host/?x=1&api_key=abc", "wss://host/?x=***&api_key=***"),
        ("https://a/b?sp=r&sig=a%2Bb%3D", "https://a/b?sp=***&sig=***"),
        ("https://a/b?X-Amz-Signature=abc", "https://a/b?X-Amz-Signature=***"),
        ("wss://host/?jwt=a.b.c#passwd=x", "wss://host/?jwt=***"),
        ("wss://host/?cursor=1&key=a&b&wantedDids=c", "wss://host/?cursor=1&key=***&wantedDids=c"),
        ("'wss://host/?token=a'b': no", "'wss://host/?token=***': no"),
        ("wss://relay.example/?token=a@b", "wss://relay.example/?token=***"),
        ("wss://relay/?token=a@b&c=d@e", "wss://***"),  # may be a user named relay/?token=…
    ],
)
def test_parameters_are_masked(text: str, masked: str) -> None:
    assert mask_credentials(text) == masked


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("host=x password=ss3cret", "host=x password=***"),
        ("m:C:secret=a token=b&c api_key=d", "m:C:secret=*** token=*** api_key=***"),
        ("C('host=x PASSWORD=ss3cret') failed", "C('host=x PASSWORD=***') failed"),
        ("sasl.passwd = 'ss3 cret' x=1", "sasl.passwd = *** x=1"),
        ('AWS_SECRET_ACCESS_KEY="a b",x', "AWS_SECRET_ACCESS_KEY=***"),
        ("password==a", "password=***"),
        ('{"password": "a b"}', '{"password": ***'),
    ],
)
def test_named_secrets_are_masked(text: str, masked: str) -> None:
    assert mask_credentials(text) == masked


@pytest.mark.parametrize(
    "text",
    [
        "at://did:plc:a/app.bsky.feed.post/1",
        "at://did:plc:a/x of me@host",
        "https://example.com/@alice",
        "wss://host:8080/path?cursor=9 for me@host",
        "https://example.com/a?cursor=1 by user@host",
        "wss://bsky.network refuses the stream, ask user@host",
        "wss://bsky.network/xrpc/com.atproto.sync.subscribeRepos?cursor=5&wantedDids=did:plc:a",
        "wss://[::1]:8080/?compress=true",
        "mail user@host at 12:30 about unexpected token: x = 3",
    ],
)
def test_the_rest_stays(text: str) -> None:
    assert mask_credentials(text) == text


@given(CALM)
def test_no_user_info_survives_masking(secret: str) -> None:
    assert mask_credentials(f"wss://:{secret}@host/path") == "wss://***@host/path"


@given(SENTENCE, AROUND, AROUND, SENTENCE)
def test_no_part_of_a_password_is_shown(before: str, begin: str, rest: str, after: str) -> None:
    shown = mask_credentials(f"{before} wss://us:{begin}{CANARY}{rest}@host {after}")
    assert CANARY not in shown


@given(
    SENTENCE, VALUE, VALUE, SENTENCE, st.sampled_from(["sig", "X-Amz-Signature", "a%20b", "x[0]"])
)
def test_no_parameter_is_shown(before: str, begin: str, rest: str, after: str, name: str) -> None:
    shown = mask_credentials(f"{before} wss://host/?cursor=1&{name}={begin}{CANARY}{rest} {after}")
    assert CANARY not in shown


@given(SENTENCE, WORD, WORD, SENTENCE, st.sampled_from(["password", "api_key", "my-token"]))
def test_no_named_secret_is_shown(
    before: str, begin: str, rest: str, after: str, name: str
) -> None:
    shown = mask_credentials(f"{before} {name}={begin}{CANARY}{rest} {after}")
    assert CANARY not in shown


@given(st.text())
def test_text_without_a_mark_of_a_secret_stays(text: str) -> None:
    text = text.replace("@", "").replace("=", "").replace('"', "").replace("'", "")
    assert mask_credentials(text) == text


# Each fails by its time limit when a pattern looks again from every place: 10^10 steps and more.
@pytest.mark.parametrize("lead", ["", "wss://", "?a=", "token=", "password='"])
@pytest.mark.parametrize(
    "part",
    [
        *(
            "a",
            "a.",
            "://",
            "wss://a@",
            "@",
            ":@",
            " ",
            "'",
            "\\'",
            "=",
            "?a=",
            "&a",
            "&",
            "?",
            ";",
        ),
        *("token", "token=", "token ", "password='", 'password="', "token='x\"", "token-"),
    ],
)
def test_the_time_grows_with_the_length(lead: str, part: str) -> None:
    mask_credentials(lead + part * (300_000 // len(part)))
