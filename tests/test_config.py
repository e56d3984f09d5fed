from __future__ import annotations

import dataclasses
import math
from argparse import ArgumentParser
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from blueflow.cli import settings_table, show_settings
from blueflow.config import SETTINGS, Settings, add_flags, load, resolve
from blueflow.errors import Exit, SettingError

GUIDE = Path(__file__).parent.parent / "docs" / "guides" / "configuration.md"


@pytest.fixture(autouse=True)
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder without a blueflow.toml that nobody meant."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def from_flags(*args: str, environ: dict[str, str] | None = None) -> Settings:
    parser = ArgumentParser()
    add_flags(parser)
    return load(parser.parse_args(args), environ or {})


def problem_of(**environ: str) -> SettingError:
    with pytest.raises(SettingError) as caught:
        load(environ=environ)
    return caught.value


def test_defaults_are_those_of_the_design() -> None:
    settings = load(environ={})
    assert settings == Settings()
    assert (settings.source, settings.cursor) == ("wss://bsky.network", "saved")
    assert (settings.commit_interval_s, settings.commit_bytes_max) == (None, None)
    assert settings.speed == math.inf
    assert settings.sink is None
    assert {settings.origin(name) for name in SETTINGS} == {"default"}


def test_each_source_stands_above_the_one_before(working_folder: Path) -> None:
    (working_folder / "blueflow.toml").write_text('limit = 1\npipeline = "toml"\ndrain_s = "2s"\n')
    settings = from_flags(
        *("--limit", "3"), environ={"BLUEFLOW_LIMIT": "2", "BLUEFLOW_PIPELINE": "environment"}
    )
    assert (settings.limit, settings.origin("limit")) == (3, "flag --limit")
    assert settings.pipeline == "environment"
    assert settings.origin("pipeline") == "environment BLUEFLOW_PIPELINE"
    assert (settings.drain_s, settings.origin("drain_s")) == (2.0, "file blueflow.toml")
    assert settings.origin("source") == "default"


def test_the_file_is_the_flags_then_the_environments_then_the_folders(working_folder: Path) -> None:
    for name in ("flag", "variable", "blueflow"):
        (working_folder / f"{name}.toml").write_text(f'pipeline = "{name}"')
    variable = {"BLUEFLOW_CONFIG": "variable.toml"}
    assert from_flags("--config", "flag.toml", environ=variable).pipeline == "flag"
    assert from_flags(environ=variable).pipeline == "variable"
    assert from_flags().pipeline == "blueflow"


def test_environment_names_that_others_share() -> None:
    settings = load(
        environ={"LOG_LEVEL": "WARN", "PROMETHEUS_PORT": "9500", "BLUEFLOW_METRICS_HOST": "::1"}
    )
    assert settings.log_level == "warning"
    assert settings.prometheus_port == 9500
    assert settings.metrics_host == "::1"


def test_an_empty_variable_is_as_if_it_were_not_set() -> None:
    assert load(environ={"LOG_LEVEL": "", "BLUEFLOW_LIMIT": ""}) == Settings()


def test_flags_may_be_given_more_than_once_or_as_a_list() -> None:
    settings = from_flags(
        *(
            "--collection",
            "app.bsky.feed.post",
            "--collection",
            "app.bsky.graph.*,app.bsky.feed.post",
        ),
        environ={"BLUEFLOW_DIDS": "did:plc:a, did:web:example.com"},
    )
    assert settings.collections == ("app.bsky.feed.post", "app.bsky.graph.*")
    assert settings.dids == ("did:plc:a", "did:web:example.com")


def test_a_list_from_a_higher_source_replaces_the_lower_one() -> None:
    environ = {"BLUEFLOW_COLLECTIONS": "app.bsky.feed.post"}
    settings = from_flags("--collection", "app.bsky.feed.like", environ=environ)
    assert settings.collections == ("app.bsky.feed.like",)


def test_toml_has_lists_and_numbers(working_folder: Path) -> None:
    (working_folder / "blueflow.toml").write_text(
        'collections = ["app.bsky.feed.post", "app.bsky.graph.*"]\n'
        "stall_timeout_s = 20\ncommit_bytes_max = 1048576\ncursor = 31527015322\nsim_rate = 1.5\n"
        'record = "~/frames.bin"\nspeed = "max"\n'
    )
    settings = load(environ={})
    assert settings.collections == ("app.bsky.feed.post", "app.bsky.graph.*")
    assert (settings.stall_timeout_s, settings.commit_bytes_max) == (20.0, 1_048_576)
    assert (settings.cursor, settings.sim_rate) == ("31527015322", 1.5)
    assert settings.record == Path.home() / "frames.bin"


def test_a_program_may_hand_over_values_by_name() -> None:
    settings = load({"record": Path("x.bin"), "limit": 5, "collections": ("a.b.c",)}, {})
    assert (settings.record, settings.limit, settings.collections) == (Path("x.bin"), 5, ("a.b.c",))
    made = Settings(limit=5)
    assert (made.origin("limit"), made.origin("source")) == ("the program", "default")


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("LOG_LEVEL", "loud", "log_level (from environment LOG_LEVEL): 'loud' is none of"),
        ("BLUEFLOW_LIMIT", "0", "limit (from environment BLUEFLOW_LIMIT): '0' is below 1"),
        ("BLUEFLOW_FOR_S", "soon", "'soon' is not a duration such as 30s"),
        ("BLUEFLOW_BUFFER_BYTES_MAX", "1MiB", "'1MiB' is below 8MiB"),
        ("BLUEFLOW_COLLECTIONS", "posts", "'posts' is no collection such as"),
        ("BLUEFLOW_CURSOR", "latest", "'latest' is neither saved, live, oldest nor a seq"),
        ("PROMETHEUS_PORT", "tcp://10.0.0.1:9090", "Kubernetes"),
        (
            "BLUEFLOW_CONFIG",
            "missing.toml",
            "config (from environment BLUEFLOW_CONFIG): cannot read",
        ),
    ],
)
def test_a_bad_value_names_its_origin(name: str, value: str, told: str) -> None:
    error = problem_of(**{name: value})
    assert told in str(error)
    assert str(error).startswith("BF-002: ")
    assert error.exit_code == Exit.USAGE


@pytest.mark.parametrize(
    ("toml", "told"),
    [
        (
            "sorce = 'sim'",
            "sorce (from file blueflow.toml): there is no such setting; perhaps",
        ),
        ("[kafka]\nx = 1", "kafka (from file blueflow.toml): there is no such setting"),
        ("limit = true", "limit (from file blueflow.toml): 'True' is neither text nor a number"),
        ("limit = [1, 2]", "is neither text nor a number"),
        ("limit = nan", "'nan' is not a whole number"),
        ("source = {}", "is neither text nor a number"),
        ("dids = [1979-05-27]", "is neither text nor a number"),
        ("limit =", "blueflow.toml is not TOML: Invalid value (at end of document)"),
    ],
)
def test_a_bad_file_names_the_key(working_folder: Path, toml: str, told: str) -> None:
    (working_folder / "blueflow.toml").write_text(toml)
    assert told in str(problem_of())


def test_a_file_that_is_not_text_is_refused(working_folder: Path) -> None:
    (working_folder / "blueflow.toml").write_bytes(b"source = '\xff\xfe'")
    assert "is not TOML" in str(problem_of())


def test_a_folder_is_no_file(working_folder: Path) -> None:
    assert "cannot read" in str(problem_of(BLUEFLOW_CONFIG=str(working_folder)))


def test_resolve_tells_all_problems_and_keeps_the_rest() -> None:
    environ = {"BLUEFLOW_LIMIT": "x", "BLUEFLOW_FOR_S": "y", "BLUEFLOW_PIPELINE": "z"}
    settings, problems = resolve(environ=environ)
    assert sorted(problem.name for problem in problems) == ["for_s", "limit"]
    assert (settings.limit, settings.pipeline) == (None, "z")


def test_no_secret_is_shown_anywhere() -> None:
    settings = load(environ={"BLUEFLOW_SOURCE": "wss://me:hunter2@host", "BLUEFLOW_LIMIT": "1"})
    assert settings.source == "wss://me:hunter2@host"
    assert settings.shown("source") == "wss://***@host"
    assert repr(settings) == "Settings(source='wss://***@host', limit='1')"
    secret = dataclasses.replace(SETTINGS["source"], secret=True)
    assert secret.shown("hunter2") == "***"
    error = problem_of(BLUEFLOW_LIMIT="https://me:hunter2@host")
    assert "hunter2" not in str(error)


def test_a_secret_that_cannot_be_read_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = dataclasses.replace(SETTINGS["limit"], secret=True)
    monkeypatch.setitem(SETTINGS, "limit", secret)
    assert "the value is not a whole number" in str(problem_of(BLUEFLOW_LIMIT="hunter2"))


def test_servers_of_kafka_make_it_the_sink_unless_another_is_named() -> None:
    environ = {"KAFKA_BOOTSTRAP_SERVERS": "a:1,b:2"}
    settings = load(environ=environ)
    assert (settings.sink, settings.kafka_bootstrap_servers) == ("kafka://a:1,b:2", "a:1,b:2")
    assert settings.origin("sink") == "environment KAFKA_BOOTSTRAP_SERVERS"
    named = from_flags("--sink", "stdout", environ=environ)
    assert (named.sink, named.origin("sink")) == ("stdout", "flag --sink")
    both = load(environ=environ | {"BLUEFLOW_SINK": "jsonl:out"})
    assert (both.sink, both.origin("sink")) == ("jsonl:out", "environment BLUEFLOW_SINK")
    by_flag = from_flags("--kafka-bootstrap-servers", "c:3", environ=environ)
    assert (by_flag.sink, by_flag.origin("sink")) == (
        "kafka://c:3",
        "flag --kafka-bootstrap-servers",
    )
    assert load(environ={"KAFKA_BOOTSTRAP_SERVERS": ""}).sink is None


def test_config_shows_kafka_as_the_sink_and_no_secret(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (
        ("KAFKA_BOOTSTRAP_SERVERS", "a:1"),
        ("BLUEFLOW_KAFKA_PASSWORD", "hunter2"),
        ("BLUEFLOW_KAFKA_USERNAME", "me"),
    ):
        monkeypatch.setenv(name, value)
    assert show_settings([]) == Exit.OK
    shown = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    told = ["kafka://a:1", "environment", "KAFKA_BOOTSTRAP_SERVERS"]
    assert shown["sink"] == told
    assert shown["kafka_password"] == ["***", "environment", "BLUEFLOW_KAFKA_PASSWORD"]
    assert shown["kafka_username"][0] == "me"
    assert "hunter2" not in str(shown)
    assert "hunter2" not in repr(load())
    assert show_settings(["--sink", "kafka://me:hunter2@a:1"]) == Exit.OK
    assert "hunter2" not in capsys.readouterr().out


def test_settings_of_kafka_are_read_as_people_write_them() -> None:
    settings = from_flags(
        *("--kafka-retention", "forever", "--topic-prefix", "", "--delivery", "AT-LEAST-ONCE"),
        *("--kafka-security-protocol", "SASL_SSL", "--kafka-sasl-mechanism", "SCRAM-SHA-256"),
        *("--kafka-compression", "None", "--partitions", "1_000", "--transaction-timeout", "1m"),
    )
    assert settings.kafka_retention_s == math.inf
    assert settings.shown("kafka_retention_s") == "forever"
    assert (settings.topic_prefix, settings.delivery) == ("", "at_least_once")
    assert settings.kafka_security_protocol == "sasl_ssl"
    assert settings.kafka_sasl_mechanism == "scram-sha-256"
    assert (settings.kafka_compression, settings.partitions) == ("none", 1000)
    assert settings.transaction_timeout_s == 60.0


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("BLUEFLOW_TOPIC_PREFIX", "blue sky/", "'blue sky/' is not up to 128 letters"),
        ("BLUEFLOW_TOPIC_PREFIX", "x" * 129, "is not up to 128 letters"),
        ("BLUEFLOW_KAFKA_RETENTION_S", "59s", "'59s' is below 60s"),
        ("BLUEFLOW_KAFKA_RETENTION_S", "-1", "'-1' is not a duration"),
        ("BLUEFLOW_DELIVERY", "twice", "'twice' is none of exactly_once, at_least_once"),
        ("BLUEFLOW_KAFKA_COMPRESSION", "gzip", "'gzip' is none of zstd, snappy, none"),
        ("BLUEFLOW_PARTITIONS", "0", "'0' is below 1"),
        ("BLUEFLOW_TRANSACTION_TIMEOUT_S", "16m", "'16m' is above 900s"),
        ("BLUEFLOW_KAFKA_PASSWORD", "hunter2\0", "the value has a NUL character"),
    ],
)
def test_settings_of_kafka_that_cannot_be_used(name: str, value: str, told: str) -> None:
    assert told in str(problem_of(**{name: value}))


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("BLUEFLOW_COLLECTION", "BLUEFLOW_COLLECTIONS"),
        ("BLUEFLOW_FOR", "BLUEFLOW_FOR_S"),
        ("BLUEFLOW_LOG_LEVEL", "LOG_LEVEL"),
        ("BLUEFLOW_SORCE", "BLUEFLOW_SOURCE"),
    ],
)
def test_a_misspelt_variable_is_told(name: str, meant: str) -> None:
    error = problem_of(**{name: "x"})
    expected = f"there is no such setting; perhaps {meant} was meant."
    assert str(error).startswith(f"BF-002: {name} (from environment {name}): {expected}")


def test_variables_that_platforms_make_are_no_mistakes() -> None:
    load(environ={
        "BLUEFLOW_SERVICE_HOST": "10.0.0.1", "BLUEFLOW_PORT": "tcp://10.0.0.1:9401",
        "BLUEFLOW_PORT_9401_TCP_ADDR": "10.0.0.1", "BLUEFLOW_TEST_FULL": "1", "BLUEFLOW_IMAGE": "x",
        "BLUEFLOW_COLLECTION": "",
    })  # fmt: skip


def test_a_long_bad_value_is_cut() -> None:
    assert len(str(problem_of(BLUEFLOW_LIMIT="x" * 10_000))) < 300


def test_every_default_is_what_its_own_parser_reads_and_its_type_says() -> None:
    hints = get_type_hints(Settings, localns={"Path": Path, "Mapping": dict})
    for name, spec in SETTINGS.items():
        if spec.default in (None, ()):
            continue
        assert spec.read(spec.shown(spec.default)) == spec.default, name
        assert type(spec.default) in (hints[name], *getattr(hints[name], "__args__", ())), name


def test_names_are_unique_and_help_tells_them() -> None:
    specs = SETTINGS.values()
    assert len({spec.flag for spec in specs}) == len({spec.environment for spec in specs})
    assert len({spec.flag for spec in specs}) == len(SETTINGS)
    parser = ArgumentParser(prog="x")
    add_flags(parser)
    shown = " ".join(parser.format_help().split())
    for spec in specs:
        assert spec.flag in shown
        assert f"env {spec.environment}]" in shown


def test_flags_of_some_settings_only() -> None:
    parser = ArgumentParser(prog="x")
    add_flags(parser, ["source", "limit"])
    args: dict[str, Any] = vars(parser.parse_args(["--limit", "1"]))
    assert args == {"config": None, "source": None, "limit": "1"}


def test_the_guide_has_the_table_of_settings() -> None:
    told = "docs/guides/configuration.md is old; paste the output of `blueflow config --markdown`"
    assert settings_table() in GUIDE.read_text(encoding="utf-8"), told
