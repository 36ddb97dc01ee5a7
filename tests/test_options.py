"""Settings: their values, their sources, their errors, and what a server makes of them."""

from __future__ import annotations

import base64
import json
import os
import pickle
import shutil
import ssl
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nats
import nkeys  # type: ignore[import-untyped]
import pytest
from nats.aio.client import Client
from pydantic import SecretStr

from natsrt.contexts import known_contexts
from natsrt.embedded import EmbeddedServer
from natsrt.errors import ConfigurationError
from natsrt.keyed_types import KeyedOptions
from natsrt.options import NATS_ENVIRONMENT, Options, describe_options
from natsrt.options.values import kind_of

SECRET = "hunter2-Pa55"


def load(environ: dict[str, str] | None = None, **settings: Any) -> Options:
    """`Options.load` with an environment of its own, so that the developer's has no influence."""
    return Options.load(environ=environ or {}, **settings)


def refused(**settings: Any) -> ConfigurationError:
    with pytest.raises(ConfigurationError) as caught:
        Options(**settings)
    return caught.value


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def save_context(config_home: Path, name: str, **fields: Any) -> dict[str, str]:
    """Write a context file as the nats CLI does, and return the environment in which it is found."""
    empty = {"description": "", "url": "", "token": "", "user": "", "password": "", "creds": "", "nsc": ""}
    write(config_home / "nats" / "context" / f"{name}.json", json.dumps({**empty, "tls_first": False, **fields}))
    return {"XDG_CONFIG_HOME": str(config_home)}


def new_key(prefix: int) -> Any:
    return nkeys.from_seed(bytearray(nkeys.encode_seed(os.urandom(32), prefix)))


def seed_of(key: Any) -> str:
    return bytes(key.seed).decode()


def public(key: Any) -> str:
    return bytes(key.public_key).decode()


# --- values ----------------------------------------------------------------------------------------------------------


def test_the_defaults_are_those_of_the_documentation() -> None:
    options = load()
    assert options.servers == ("nats://127.0.0.1:4222",)
    assert (options.connect_timeout, options.offline_timeout, options.call_timeout) == (5.0, 30.0, None)
    assert options.max_pending_bytes == options.keep_replies_bytes == 64 * 1024 * 1024
    assert options.infer_types and options.send_tracebacks and options.ignore_unhandled_exceptions
    assert options == Options()


def test_every_setting_is_described_with_its_unit_and_the_meaning_of_none() -> None:
    rows = list(describe_options())
    assert [row.field for row in rows] == list(Options.model_fields)
    for row in rows:
        assert row.env == f"NATSRT_{row.field.upper()}"
        assert row.description.endswith("."), row.field
        assert not row.type.startswith("seconds") or row.description.startswith("Seconds"), row.field
        assert not row.field.endswith("bytes") or row.description.startswith("Bytes"), row.field
        assert not row.type.endswith("or none") or "None: " in row.description, row.field


def test_every_documented_default_is_what_its_variable_would_set() -> None:
    environ = {row.env: row.default for row in describe_options() if row.default != "none"}
    assert load(environ) == Options()


def test_options_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Options().call_timeout = 1.0  # type: ignore[misc]


def test_options_can_be_compared_hashed_and_pickled() -> None:
    options = Options(servers="nats://u:p@h", call_timeout=3)
    assert pickle.loads(pickle.dumps(options)) == options
    assert len({options, Options(servers="nats://u:p@h", call_timeout=3)}) == 1


def test_importing_the_settings_loads_no_client_no_yaml_and_no_cryptography() -> None:
    script = "import sys, natsrt.options; print([m for m in ('nats', 'yaml', 'nkeys', 'nacl') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded_by_autogen = subprocess.run(
        [sys.executable, "-c", script.replace("natsrt.options", "natsrt.errors")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == loaded_by_autogen.stdout


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("10", 10.0), (" 0.5 ", 0.5), ("250ms", 0.25), ("1m30s", 90.0), ("1.5h", 5400.0), ("1e1", 10.0)],
)
def test_text_becomes_seconds(text: str, seconds: float) -> None:
    assert Options(plain_timeout=text).plain_timeout == pytest.approx(seconds)


def test_the_word_none_stands_for_none_where_none_has_a_meaning() -> None:
    assert load({"NATSRT_OFFLINE_TIMEOUT": "none"}).offline_timeout is None
    with pytest.raises(ConfigurationError, match="NATSRT_PLAIN_TIMEOUT: must be a number"):
        load({"NATSRT_PLAIN_TIMEOUT": "none"})


@pytest.mark.parametrize(
    "value", [0, -1, float("inf"), float("nan"), "nan", "soon", "5 parsecs", "5s3", True, [], None]
)
def test_seconds_that_are_no_positive_number_are_refused(value: object) -> None:
    assert refused(plain_timeout=value).setting == "plain_timeout"


@pytest.mark.parametrize("value", [0, -1, 1.5, "many", True, None])
def test_sizes_that_are_no_positive_whole_number_are_refused(value: object) -> None:
    assert refused(max_pending_bytes=value).setting == "max_pending_bytes"


def test_every_number_has_an_end_that_servers_can_count() -> None:
    for field, info in Options.model_fields.items():
        kind, _ = kind_of(info)
        if kind in (int, float):
            assert refused(**{field: kind(2**63)}).setting == field
            assert refused(**{field: kind(2**70)}).setting == field


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"namespace": "a.b"}, "namespace: must be one token of letters, digits, - and _, not 'a.b'"),
        ({"namespace": "a\n"}, "namespace: must be one token"),
        ({"inbox_prefix": "in.>"}, "inbox_prefix: must be subject tokens"),
        ({"inbox_prefix": "in."}, "inbox_prefix: must be subject tokens"),
        ({"inbox_prefix": "$KV.x"}, "inbox_prefix: must be subject tokens"),
        ({"inbox_prefix": "agent"}, "inbox_prefix: must not be 'agent'"),
        ({"inbox_prefix": "acme", "namespace": "acme"}, "inbox_prefix: must not be 'acme'"),
        ({"inbox_prefix": "acme.natsrt.x", "namespace": "acme"}, "inbox_prefix: must not be 'acme.natsrt.x'"),
        ({"jetstream_domain": ""}, "jetstream_domain: must be the domain in the server's jetstream block"),
        ({"jetstream_domain": "a b"}, "jetstream_domain: must be the domain in the server's jetstream block"),
        ({"jetstream_domain": "hub.>"}, "jetstream_domain: must be the domain in the server's jetstream block"),
        ({"infer_types": "maybe"}, "infer_types: must be true or false, not 'maybe'"),
        ({"registry_replicas": 6}, "registry_replicas: must be a whole number from 1 to 5, not 6"),
        ({"name": ""}, "name: must be text that is not empty, not ''"),
        ({"heartbeat_ttl": 3.0}, "heartbeat_ttl: must be more than twice heartbeat_interval"),
        ({"heartbeat_ttl": 0.5, "heartbeat_interval": 0.1}, "heartbeat_ttl: must be a number of seconds from 1 to"),
        ({"result_ttl": 0.5}, "result_ttl: must be a number of seconds from 1 to 1,000,000,000, not 0.5"),
        ({"result_ttl": 1e12}, "result_ttl: must be a number of seconds from 1 to 1,000,000,000, not 1000000000000.0"),
        ({"blob_ttl": "100ms"}, "blob_ttl: must be a number of seconds from 1 to 1,000,000,000, not '100ms'"),
        (
            {"ack_wait": 1e20},
            "ack_wait: must be a number of seconds greater than 0 and at most 9,223,372,036, not 1e+20",
        ),
        ({"call_timeout": -1}, "call_timeout: must be a number of seconds greater than 0 and at most 9,223,372,036 or"),
        ({"max_deliver": 2**63}, "max_deliver: must be a whole number from 1 to 9,223,372,036,854,775,807, not 9"),
        (
            {"max_running": 2**70},
            "max_running: must be a whole number from 1 to 9,223,372,036,854,775,807 or none, not",
        ),
        ({"retries": {"": {}}}, "retries: each name must be an agent type, such as 'writer', not ''"),
        ({"retries": {"a b": {}}}, "retries: each name must be an agent type, such as 'writer', not 'a b'"),
        ({"retries": {"a": {"max_deliver": 2**63}}}, "retries: a: max_deliver: must be a whole number from 1 to 9,223"),
        (
            {"retries": {"a": {"retry_delay": 1e10}}},
            "retries: a: retry_delay: must be a number of seconds greater than 0",
        ),
        ({"servers": 5}, "servers: must be one URL or a list of URLs, not a value of type int"),
        ({"servers": []}, "servers: must name at least one server"),
    ],
)
def test_a_wrong_value_is_refused_with_what_would_be_right(settings: dict[str, Any], text: str) -> None:
    assert str(refused(**settings)).startswith(text)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("counter, chat", {"counter": True, "chat": True}),
        (["counter"], {"counter": True}),
        ({"counter": True, "chat": False}, {"counter": True, "chat": False}),
        ({"counter": KeyedOptions(rebalance=True)}, {"counter": KeyedOptions(rebalance=True)}),
        (
            {"counter": {"save": "interval", "save_interval": "1m30s", "idle_timeout": "none"}},
            {"counter": KeyedOptions(save="interval", save_interval=90.0, idle_timeout=None)},
        ),
    ],
)
def test_keyed_types_are_names_or_a_table(given: object, said: dict[str, object]) -> None:
    assert dict(Options(keyed=given).keyed) == said


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (7, "table of agent types"),
        (["counter", ""], "each name must be an agent type, such as 'writer', not ''"),
        ({"a b": True}, "each name must be an agent type, such as 'writer', not 'a b'"),
        ({5: True}, "each name must be an agent type, such as 'writer', not 5"),
        ({"counter": {"idle_timeout": 1e10}}, "idle_timeout: must be a number of seconds greater than 0 and at most"),
        ({"counter": 7}, "counter: must be true, false, or a table of options"),
        ({"counter": {"saves": "message"}}, "counter: there is no option 'saves'; the options are concurrency"),
        ({"counter": {"save": "never"}}, "counter: save: must be one of message, interval, manual"),
        ({"counter": {"save_interval": "none"}}, "counter: save_interval: must be a number of seconds"),
        ({"counter": {"idle_timeout": "soon"}}, "counter: idle_timeout: must be a number of seconds"),
    ],
)
def test_keyed_types_that_cannot_be_used_are_refused(given: object, text: str) -> None:
    error = refused(keyed=given)
    assert error.setting == "keyed"
    assert text in error.problem


def test_an_unknown_setting_names_the_nearest_known_one() -> None:
    assert str(refused(offline_timout=3)) == "offline_timout: there is no such setting; did you mean offline_timeout?"
    with pytest.raises(ConfigurationError, match="did you mean servers"):
        load(server="nats://h")


@pytest.mark.parametrize(
    ("theirs", "told"),
    [
        ("host_address", "natsrt calls this setting servers"),
        ("url", "natsrt calls this setting servers"),
        ("extra_grpc_config", "natsrt does not use gRPC"),
        ("payload_serialization_format", "natsrt sends all messages as JSON"),
    ],
)
def test_an_argument_of_another_runtime_is_answered_with_what_natsrt_has_for_it(theirs: str, told: str) -> None:
    assert told in str(refused(**{theirs: "x"}))


def test_a_setting_like_no_other_lists_those_that_exist() -> None:
    assert "the settings are servers, name, namespace" in str(refused(zzz=1))


def test_replacing_changes_some_settings_and_checks_all() -> None:
    options = Options(servers="nats://h", call_timeout=3)
    changed = options.replace(call_timeout=None, plain_timeout=5)
    assert (changed.servers, changed.call_timeout, changed.plain_timeout) == (options.servers, None, 5.0)
    assert options.call_timeout == 3.0
    with pytest.raises(ConfigurationError, match="did you mean call_timeout"):
        options.replace(call_timout=1)
    with pytest.raises(ConfigurationError, match="heartbeat_ttl"):
        options.replace(heartbeat_interval=5)


def test_replacing_a_credential_by_another_kind_removes_the_first() -> None:
    changed = Options(servers="nats://u:p@h").replace(token="t")
    assert (changed.user, changed.password, changed.token) == (None, None, SecretStr("t"))


# --- servers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "servers"),
    [
        ("h", ["nats://h:4222"]),
        ("h:1", ["nats://h:1"]),
        ("nats://a:1, nats://b:2", ["nats://a:1", "nats://b:2"]),
        (["tls://a", "NATS://b:2/"], ["tls://a:4222", "nats://b:2"]),
        ("nats://[::1]:1", ["nats://[::1]:1"]),
        ("wss://h/path?x=1", ["wss://h/path?x=1"]),
    ],
)
def test_server_urls_are_completed(given: str | list[str], servers: list[str]) -> None:
    assert Options(servers=given).server_list == servers


@pytest.mark.parametrize(
    "url",
    [
        f"nats://u:{SECRET}@h:port",
        f"nats://u:{SECRET}/x@h:1",
        f"nats://u:{SECRET},x@h:1",
        f"nats://u:{SECRET}@",
        f"nats://u:{SECRET}@h:0",
        f"nats://u:{SECRET}@h:1/path",
        f"http://u:{SECRET}@h",
        f"nats://a:{SECRET}@h,nats://b:{SECRET}@i",
        f"nats://:{SECRET}@h",
        f"nats://h,ws://u:{SECRET}@i",
        "nats://u:@h",
        "",
        "nats://h,",
    ],
)
def test_a_server_url_that_cannot_be_used_is_refused_without_showing_it(url: str) -> None:
    error = refused(servers=url)
    assert error.setting == "servers"
    assert SECRET not in str(error)


def test_credentials_in_a_url_are_decoded_and_taken_out_of_it() -> None:
    options = Options(servers="nats://me%40x:p%2Fw@a:1,b:2")
    assert options.server_list == options.safe_servers == ["nats://a:1", "nats://b:2"]
    assert options.user == "me@x"
    assert options.connect_kwargs()["password"] == "p/w"


def test_a_user_alone_in_a_url_is_a_token() -> None:
    assert Options(servers="nats://t0ken@h").connect_kwargs()["token"] == "t0ken"


def test_servers_in_messages_have_no_query() -> None:
    options = Options(servers=f"wss://h:1/p?access={SECRET}")
    assert options.safe_servers == ["wss://h:1/p"]
    assert SECRET not in repr(options)


def test_a_websocket_url_without_its_package_is_refused_when_connecting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match="aiohttp"):
        Options(servers="ws://h:1").connect_kwargs()


# --- secrets ---------------------------------------------------------------------------------------------------------


def test_secrets_show_neither_in_repr_nor_in_text_nor_in_a_dump() -> None:
    seed = seed_of(new_key(nkeys.PREFIX_BYTE_USER))
    for options in (
        Options(user="u", password=SECRET),
        Options(token=SECRET),
        Options(servers=f"nats://u:{SECRET}@h"),
        Options(nkey_seed=seed),
    ):
        for shown in (repr(options), str(options), str(options.model_dump()), options.model_dump_json()):
            assert SECRET not in shown
            assert seed not in shown


@pytest.mark.parametrize(
    "settings",
    [
        {"token": [SECRET]},
        {"password": {"is": SECRET}},
        {"nkey_seed": f"SU{SECRET}"},
        {"token": SECRET, "user": "u", "password": SECRET},
        {"password": SECRET},
        {"servers": f"nats://u:{SECRET}@h", "token": SECRET},
        {"servers": [f"nats://u:{SECRET}@h", 5]},
        {"creds": f"-----BEGIN NATS USER JWT-----\n{SECRET}"},
        {"tokn": SECRET},
        {"token": SECRET, "plain_timeout": "x"},
    ],
)
def test_secrets_do_not_show_in_errors(settings: dict[str, Any]) -> None:
    error = refused(**settings)
    assert SECRET not in str(error)
    assert error.__suppress_context__ or error.__context__ is None


def test_a_seed_given_as_the_path_of_its_file_does_not_show() -> None:
    seed = seed_of(new_key(nkeys.PREFIX_BYTE_USER))
    error = refused(nkey_seed_file=seed)
    assert str(error) == "nkey_seed_file: must be the path of a file, not its contents"


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"user": "u"}, "user: is given without password"),
        ({"password": "p"}, "password: is given without user"),
        ({"user": "u", "password": "p", "token": "t"}, "token: cannot be used together with user, password"),
        ({"servers": "nats://u:p@h", "token": "t"}, "servers: the URL contains credentials, and token is given too"),
        ({"nkey_seed": "SUAB"}, "nkey_seed: must be the whole seed of a user NKEY"),
        ({"nkey_seed": "SAAB"}, "nkey_seed: must be the whole seed of a user NKEY"),
    ],
)
def test_credentials_that_contradict_each_other_are_refused(settings: dict[str, Any], text: str) -> None:
    assert str(refused(**settings)).startswith(text)


# --- files that are named --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["creds", "nkey_seed_file", "tls_ca", "tls_cert", "tls_key"])
def test_a_missing_file_is_refused_at_once_with_its_path(field: str, tmp_path: Path) -> None:
    assert str(refused(**{field: tmp_path / "gone"})) == f"{field}: there is no file {tmp_path / 'gone'}"
    assert "is a directory" in str(refused(**{field: tmp_path}))


def test_a_file_that_is_no_credentials_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.creds", "hello\n")
    assert str(refused(creds=path)).startswith(f"creds: {path} is not a credentials file")


def test_the_seed_is_found_between_comments(tmp_path: Path) -> None:
    seed = seed_of(new_key(nkeys.PREFIX_BYTE_USER))
    path = write(tmp_path / "user.nk", f"# mine\r\n{seed}\r\n")
    assert Options(nkey_seed_file=path).connect_kwargs()["nkeys_seed_str"] == seed


@pytest.mark.parametrize("content", ["nothing", "SUABCDEFGHIJKLMNOPQRSTUVWXYZABCDEFGHIJKLMNOPQRSTUVWXYZ2345"])
def test_a_file_without_a_seed_is_refused(content: str, tmp_path: Path) -> None:
    error = refused(nkey_seed_file=write(tmp_path / "user.nk", content))
    assert error.setting == "nkey_seed_file"
    assert content not in error.problem.replace(str(tmp_path), "")


def test_paths_become_absolute_and_a_tilde_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "ca.pem", "x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Options(tls_ca="ca.pem").tls_ca == Options(tls_ca="~/ca.pem").tls_ca == tmp_path / "ca.pem"


# --- environment -----------------------------------------------------------------------------------------------------


def test_the_variables_of_the_nats_cli_are_read(tmp_path: Path) -> None:
    file = str(write(tmp_path / "x.pem", "x"))
    options = load(
        {
            "NATS_URL": "nats://a,nats://b:1",
            "NATS_USER": "u",
            "NATS_PASSWORD": "p",
            "NATS_CA": file,
            "NATS_CERT": file,
            "NATS_KEY": file,
            "NATS_TIMEOUT": "3s",
        }
    )
    assert options.server_list == ["nats://a:4222", "nats://b:1"]
    assert (options.user, options.password) == ("u", SecretStr("p"))
    assert options.tls_ca == options.tls_cert == options.tls_key == Path(file)
    assert options.connect_timeout == 3.0


def test_each_variable_of_the_nats_cli_means_a_setting() -> None:
    assert set(NATS_ENVIRONMENT.values()) <= set(Options.model_fields)


def test_a_user_without_a_password_is_a_token_as_in_the_nats_cli() -> None:
    assert load({"NATS_USER": "t"}).token == SecretStr("t")
    assert load({"NATS_TOKEN": "t"}).token == SecretStr("t")
    assert load({"NATS_USER": "u"}, password="p").user == "u"


def test_every_setting_has_a_variable_that_stands_above_that_of_the_nats_cli() -> None:
    options = load({"NATSRT_SERVERS": "ours", "NATS_URL": "nats://theirs", "NATSRT_INFER_TYPES": "no"})
    assert options.server_list == ["nats://ours:4222"]
    assert options.infer_types is False


def test_an_empty_variable_counts_as_not_set() -> None:
    assert load({"NATS_CREDS": "", "NATSRT_CALL_TIMEOUT": "", "NATSRT_CONFIG": ""}) == Options()


def test_an_unknown_variable_of_ours_names_the_nearest_known_one() -> None:
    with pytest.raises(ConfigurationError, match="NATSRT_OFFLINE_TIMOUT: .*did you mean NATSRT_OFFLINE_TIMEOUT"):
        load({"NATSRT_OFFLINE_TIMOUT": "3"})


def test_variables_of_the_test_suite_and_of_others_are_left_alone() -> None:
    assert load({"NATSRT_TEST_TAP": "1", "NATS_COLOR": "x", "natsrt_x": "1", "PATH": "/"}) == Options()


def test_an_error_names_the_variable() -> None:
    with pytest.raises(ConfigurationError) as caught:
        load({"NATSRT_MAX_PENDING_BYTES": "lots"})
    assert (
        str(caught.value)
        == "NATSRT_MAX_PENDING_BYTES: must be a whole number from 1 to 9,223,372,036,854,775,807, not 'lots'"
    )
    with pytest.raises(ConfigurationError, match="NATS_CREDS: there is no file /gone"):
        load({"NATS_CREDS": "/gone"})


def test_a_proxy_asked_for_in_the_environment_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="NATS_SOCKS_PROXY"):
        load({"NATS_SOCKS_PROXY": "socks5://h"})


# --- configuration file ----------------------------------------------------------------------------------------------

TOML = 'servers = ["nats://a:1", "nats://b:2"]\noffline_timeout = "none"\ncall_timeout = 3\ntls_ca = "tls/ca.pem"\n'
YAML = "servers:\n  - nats://a:1\n  - nats://b:2\noffline_timeout: null\ncall_timeout: 3\ntls_ca: tls/ca.pem\n"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("natsrt.toml", TOML),
        ("natsrt.toml", f"[other]\ncall_timeout = 9\n[natsrt]\n{TOML}"),
        ("natsrt.yaml", YAML),
        ("natsrt.YML", "other:\n  call_timeout: 9\nnatsrt:\n  " + YAML.replace("\n", "\n  ")),
    ],
)
def test_a_file_is_read_and_its_paths_are_relative_to_it(name: str, text: str, tmp_path: Path) -> None:
    write(tmp_path / "etc" / "tls" / "ca.pem", "x")
    options = Options.from_file(write(tmp_path / "etc" / name, text))
    assert options.server_list == ["nats://a:1", "nats://b:2"]
    assert (options.offline_timeout, options.call_timeout) == (None, 3.0)
    assert options.tls_ca == tmp_path / "etc" / "tls" / "ca.pem"


@pytest.mark.parametrize("name", ["x.toml", "x.yaml"])
def test_an_empty_file_changes_nothing(name: str, tmp_path: Path) -> None:
    assert Options.from_file(write(tmp_path / name, "")) == Options()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.toml", "call_timeout = 1\ncall_timout = 3\n", "{path}, line 2: call_timout: there is no such setting"),
        ("x.toml", "\ncall_timeout = -1\n", "{path}, line 2: call_timeout: must be a number of seconds"),
        ("x.toml", f'user = "u"\ncall_timeout = "{SECRET}\n', "{path}: is not valid TOML: "),
        ("x.toml", "[natsrt]\n[natsrt.tls]\nca = 1\n", "{path}: tls: there is no such setting"),
        (
            "x.toml",
            "[tool.natsrt]\nname = 'x'\n",
            "{path}: [tool]: natsrt's settings must be in the table [natsrt], not in [tool.natsrt]",
        ),
        (
            "x.toml",
            "[project]\nname = 'x'\n[tool.ruff]\n",
            "{path}: [project]: natsrt's settings must be in the table [natsrt]",
        ),
        (
            "x.toml",
            "[nats]\nservers = 'x'\n",
            "{path}: [nats]: natsrt's settings must be in the table [natsrt]",
        ),
        (
            "x.yaml",
            "nats:\n  servers: x\n",
            "{path}: [nats]: natsrt's settings must be in the table [natsrt]",
        ),
        ("x.toml", "debug = true\n[natsrt]\n", "{path}: debug: must be in a table"),
        ("x.toml", "natsrt = 1\n", "{path}: natsrt: must be a table"),
        ("x.yaml", "a: 1\ncall_timeout: x\n", "{path}, line 1: a: there is no such setting"),
        ("x.yaml", "natsrt:\n  user: 5\n", "{path}, line 2: user: must be text"),
        ("x.yaml", "call_timeout: 1\ncall_timeout: 2\n", "{path}, line 2: call_timeout: is given twice"),
        ("x.yaml", f"token: *{SECRET}\n", "{path}, line 1: is not valid YAML"),
        ("x.yaml", "- a\n", "{path}: must contain settings"),
        ("x.yaml", "creds: gone.creds\n", "{path}, line 1: creds: there is no file {directory}/gone.creds"),
        ("x.yaml", "servers: nats://h:x\n", "{path}, line 1: servers: URL 1 cannot be read"),
        ("x.ini", "", "config: {path} must end in .toml, .yaml or .yml"),
    ],
)
def test_an_error_in_a_file_names_file_line_and_setting(name: str, text: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, text)
    with pytest.raises(ConfigurationError) as caught:
        Options.from_file(path)
    assert str(caught.value).startswith(message.format(path=path, directory=tmp_path))
    assert SECRET not in str(caught.value)


def test_a_missing_or_unreadable_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"config: there is no file .*gone\.toml"):
        Options.from_file(tmp_path / "gone.toml")
    with pytest.raises(ConfigurationError, match="NATSRT_CONFIG: there is no file"):
        load({"NATSRT_CONFIG": str(tmp_path / "gone.toml")})
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigurationError, match="not UTF-8"):
        Options.from_file(tmp_path / "bytes.toml")
    (tmp_path / "d.toml").mkdir()
    with pytest.raises(ConfigurationError, match="cannot be read"):
        Options.from_file(tmp_path / "d.toml")


# --- precedence ------------------------------------------------------------------------------------------------------


def test_code_stands_above_environment_above_file_above_context_above_defaults(tmp_path: Path) -> None:
    environ = save_context(tmp_path, "c", url="nats://context", inbox_prefix="C")
    config = write(tmp_path / "x.toml", 'context = "c"\nplain_timeout = 2\ncall_timeout = 2\nbusy_retry = 2\n')
    environ |= {"NATSRT_PLAIN_TIMEOUT": "3", "NATSRT_CALL_TIMEOUT": "3"}
    options = load(environ, config=config, plain_timeout=4)
    assert (options.plain_timeout, options.call_timeout, options.busy_retry) == (4.0, 3.0, 2.0)
    assert (options.server_list, options.inbox_prefix, options.context) == (["nats://context:4222"], "C", "c")
    assert load({**environ, "NATSRT_CONFIG": str(config)}) == load(environ, config=config)
    assert load({**environ, "NATS_URL": "nats://e"}, config=config).server_list == ["nats://e:4222"]


def test_an_argument_that_is_none_counts_as_not_given() -> None:
    assert load({"NATS_URL": "nats://e"}, servers=None, call_timeout=None).server_list == ["nats://e:4222"]
    assert load({"NATSRT_CALL_TIMEOUT": "3"}, call_timeout="none").call_timeout is None


def test_a_credential_of_another_kind_in_a_lower_source_is_left_out(tmp_path: Path) -> None:
    config = write(tmp_path / "x.toml", 'user = "u"\npassword = "p"\n')
    options = load({"NATS_CREDS": "/gone"}, config=config, token="t")
    assert (options.token, options.creds, options.user, options.password) == (SecretStr("t"), None, None, None)


def test_a_user_from_a_file_and_a_password_from_the_environment_belong_together(tmp_path: Path) -> None:
    config = write(tmp_path / "x.toml", 'user = "u"\n')
    assert load({"NATS_PASSWORD": "p"}, config=config).connect_kwargs()["password"] == "p"


def test_credentials_in_a_url_go_with_the_url() -> None:
    options = load({"NATS_URL": f"nats://u:{SECRET}@prod"}, servers="nats://localhost")
    assert (options.user, options.password) == (None, None)
    options = load({"NATS_URL": f"nats://u:{SECRET}@prod"}, token="t")
    assert (options.server_list, options.user, options.token) == (["nats://prod:4222"], None, SecretStr("t"))


def test_an_error_about_credentials_in_a_url_names_its_source() -> None:
    with pytest.raises(ConfigurationError, match="^NATS_URL: the URL contains credentials, and token is given too"):
        load({"NATS_URL": "nats://u:p@h", "NATS_TOKEN": "t"})


# --- contexts --------------------------------------------------------------------------------------------------------


def test_a_context_gives_its_settings(tmp_path: Path) -> None:
    write(tmp_path / "ca.pem", "x")
    environ = save_context(
        tmp_path,
        "prod",
        url="nats://a:1,nats://b:2",
        user="u",
        password="env://PROD_PASSWORD",
        ca="$WHERE/ca.pem",
        tls_first=True,
        inbox_prefix="_IN.x",
        jetstream_domain="hub",
        description="x",
        color_scheme="bold",
    )
    options = load({**environ, "WHERE": str(tmp_path), "PROD_PASSWORD": "p"}, context="prod")
    assert options.server_list == ["nats://a:1", "nats://b:2"]
    assert (options.user, options.password) == ("u", SecretStr("p"))
    assert (options.tls_ca, options.tls_first, options.inbox_prefix) == (tmp_path / "ca.pem", True, "_IN.x")
    assert options.jetstream_domain == "hub"


def test_paths_in_a_context_may_start_at_home(tmp_path: Path) -> None:
    write(
        tmp_path / ".config" / "nats" / "context" / "h.json", json.dumps({"ca": "~/ca.pem", "cert": "file://~/ca.pem"})
    )
    write(tmp_path / "ca.pem", "x")
    options = load({"HOME": str(tmp_path), "NATS_CONTEXT": "h"})
    assert options.tls_ca == options.tls_cert == tmp_path / "ca.pem"


def test_a_context_may_be_given_to_the_constructor_and_as_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in save_context(tmp_path, "c", url="nats://context", token="t").items():
        monkeypatch.setenv(name, value)
    options = Options(context="c")
    assert (options.server_list, options.token) == (["nats://context:4222"], SecretStr("t"))
    assert Options(context="c", user="u", password="p").token is None
    assert load({}, context=str(tmp_path / "nats" / "context" / "c.json")).server_list == ["nats://context:4222"]


def test_the_context_is_not_read_again_when_a_setting_is_replaced(tmp_path: Path) -> None:
    options = load(save_context(tmp_path, "c", url="nats://context"), context="c")
    changed = options.replace(call_timeout=1)
    assert (changed.server_list, changed.context) == (["nats://context:4222"], "c")
    with pytest.raises(ConfigurationError, match="context: cannot be replaced"):
        options.replace(context="d")


def test_the_context_that_the_nats_cli_selected_is_not_used(tmp_path: Path) -> None:
    environ = save_context(tmp_path, "selected", url="nats://elsewhere")
    write(tmp_path / "nats" / "context.txt", "selected")
    assert load(environ) == Options()


@pytest.mark.parametrize("name", ["gone", "../c", "a/b", "nul\0", ".."])
def test_an_unknown_context_lists_those_that_exist(name: str, tmp_path: Path) -> None:
    environ = save_context(tmp_path, "alpha") | save_context(tmp_path, "beta")
    assert known_contexts(environ) == ["alpha", "beta"]
    with pytest.raises(
        ConfigurationError, match="^context: there is no NATS context .*; those that exist: alpha, beta"
    ):
        load(environ, context=name)


def test_an_error_in_a_context_names_its_file_and_where_it_was_asked_for(tmp_path: Path) -> None:
    environ = save_context(tmp_path, "c", creds="/gone.creds")
    path = tmp_path / "nats" / "context" / "c.json"
    with pytest.raises(ConfigurationError) as caught:
        load(environ, context="c")
    assert str(caught.value) == f"NATS context {path}: creds: there is no file /gone.creds"
    with pytest.raises(ConfigurationError, match="^NATS_CONTEXT: there is no NATS context 'd'"):
        load({**environ, "NATS_CONTEXT": "d"})


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"nsc": "nsc://o/a/u"}, "nsc: natsrt does not run nsc"),
        ({"socks_proxy": "socks5://h"}, "socks_proxy: natsrt cannot connect through"),
        ({"user_jwt": "eyJ", "user_seed": ""}, "user_jwt: natsrt takes a JWT from a credentials file only"),
        ({"windows_cert_store": "user"}, "windows_cert_store: natsrt cannot use"),
        ({"jetstream_domain": "a.b"}, "jetstream_domain: must be the domain in the server's jetstream block"),
        ({"jetstream_api_prefix": "JS.acc"}, "jetstream_api_prefix: natsrt uses no other API prefix"),
        ({"creds": "op://vault/creds"}, "creds: natsrt cannot read references with op:"),
        ({"creds": "data:;base64,AAAA"}, "creds: natsrt cannot read references with data:"),
        ({"password": "op://vault/x", "user": "u"}, "password: natsrt cannot read references with op:"),
        ({"user": "u", "password": "env://GONE"}, "password: refers to the environment variable 'GONE'"),
        ({"url": 5}, "url: must be text"),
    ],
)
def test_a_context_that_needs_what_natsrt_cannot_do_is_refused(
    fields: dict[str, Any], text: str, tmp_path: Path
) -> None:
    environ = save_context(tmp_path, "c", **fields)
    with pytest.raises(ConfigurationError) as caught:
        load(environ, context="c")
    assert f"c.json: {text}" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "text"), [("{\n,", "line 2, is not JSON"), ("[]", "one JSON object"), ("\xff", "not UTF-8")]
)
def test_a_context_that_cannot_be_read_is_refused(content: str, text: str, tmp_path: Path) -> None:
    environ = save_context(tmp_path, "c")
    (tmp_path / "nats" / "context" / "c.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigurationError, match=text):
        load(environ, context="c")


# --- real connections ------------------------------------------------------------------------------------------------


async def user_at_server(options: Options) -> str | None:
    """Connect with the settings, and ask the server as whom; None for a connection without a user."""
    client = Client()
    try:
        await client.connect(**options.connect_kwargs(), allow_reconnect=False)
    except nats.errors.Error:
        # nats-py leaves the socket of a refused connection open. (After a failed TLS handshake its close() never ends.)
        await client.close()
        raise
    try:
        answer = await client.request("$SYS.REQ.USER.INFO", timeout=5)
        user: str | None = json.loads(answer.data)["data"].get("user")
        return user
    finally:
        await client.close()


async def test_the_default_settings_connect(server: EmbeddedServer) -> None:
    client = await nats.connect(**load(servers=server.url, name="me", inbox_prefix="_IN.me").connect_kwargs())
    try:
        assert client.options["name"] == "me"
        assert client.new_inbox().startswith("_IN.me.")
    finally:
        await client.close()


async def test_a_user_and_password_connect(tmp_path: Path) -> None:
    config = write(tmp_path / "s.conf", 'authorization { user: me, password: "p@/w%" }\n')
    async with EmbeddedServer(config=config) as server:
        host = server.url.removeprefix("nats://")
        assert await user_at_server(load(servers=server.url, user="me", password="p@/w%")) == "me"
        assert await user_at_server(load({"NATS_URL": f"nats://me:p%40%2Fw%25@{host}"})) == "me"
        environ = save_context(tmp_path, "c", url=server.url, user="me", password="p@/w%")
        assert await user_at_server(load(environ, context="c")) == "me"
        with pytest.raises(nats.errors.Error, match="(?i)authorization"):
            await user_at_server(load(servers=server.url, user="me", password="wrong"))


async def test_a_token_connects(tmp_path: Path) -> None:
    config = write(tmp_path / "s.conf", f'authorization {{ token: "{SECRET}" }}\n')
    async with EmbeddedServer(config=config) as server:
        host = server.url.removeprefix("nats://")
        for options in (
            load(servers=server.url, token=SECRET),
            load(servers=f"nats://{SECRET}@{host}"),
            load({"NATS_URL": server.url, "NATS_USER": SECRET}),
        ):
            await user_at_server(options)
        with pytest.raises(nats.errors.Error, match="(?i)authorization"):
            await user_at_server(load(servers=server.url, token="wrong"))


async def test_an_nkey_seed_and_a_file_with_one_connect(tmp_path: Path) -> None:
    key = new_key(nkeys.PREFIX_BYTE_USER)
    config = write(tmp_path / "s.conf", f"authorization {{ users: [ {{ nkey: {public(key)} }} ] }}\n")
    file = write(tmp_path / "user.nk", f"# a comment\n{seed_of(key)}\n")
    async with EmbeddedServer(config=config) as server:
        assert await user_at_server(load(servers=server.url, nkey_seed=seed_of(key))) == public(key)
        assert await user_at_server(load({"NATS_URL": server.url, "NATS_NKEY": str(file)})) == public(key)


def signed(issuer: Any, subject: str, kind: str, **claims: Any) -> str:
    """A NATS JWT: https://github.com/nats-io/jwt, version 2."""

    def encoded(value: dict[str, Any]) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()

    payload = {
        "jti": base64.b32encode(os.urandom(32)).rstrip(b"=").decode(),
        "iat": int(time.time()),
        "iss": public(issuer),
        "sub": subject,
        "name": kind,
        "nats": {**claims, "type": kind, "version": 2},
    }
    text = f"{encoded({'typ': 'JWT', 'alg': 'ed25519-nkey'})}.{encoded(payload)}"
    return f"{text}.{base64.urlsafe_b64encode(issuer.sign(text.encode())).rstrip(b'=').decode()}"


async def test_a_credentials_file_connects(tmp_path: Path) -> None:
    operator, user = new_key(nkeys.PREFIX_BYTE_OPERATOR), new_key(nkeys.PREFIX_BYTE_USER)
    account, system = new_key(nkeys.PREFIX_BYTE_ACCOUNT), new_key(nkeys.PREFIX_BYTE_ACCOUNT)
    unlimited = {"subs": -1, "data": -1, "payload": -1}
    limits = {**unlimited, "imports": -1, "exports": -1, "wildcards": True, "conn": -1, "leaf": -1}
    accounts = {key: signed(operator, public(key), "account", limits=limits) for key in (account, system)}
    user_jwt = signed(account, public(user), "user", pub={}, sub={}, **unlimited)
    config = write(
        tmp_path / "s.conf",
        f"operator: {signed(operator, public(operator), 'operator')}\n"
        f"system_account: {public(system)}\nresolver: MEMORY\nresolver_preload {{\n"
        + "".join(f"  {public(key)}: {jwt}\n" for key, jwt in accounts.items())
        + "}\n",
    )
    creds = write(
        tmp_path / "user.creds",
        f"-----BEGIN NATS USER JWT-----\n{user_jwt}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{seed_of(user)}\n------END USER NKEY SEED------\n",
    )
    async with EmbeddedServer(config=config) as server:
        assert await user_at_server(load(servers=server.url, creds=creds)) == public(user)
        environ = save_context(tmp_path, "c", url=server.url, creds="$HERE/user.creds")
        assert await user_at_server(load({**environ, "HERE": str(tmp_path)}, context="c")) == public(user)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1, which is its own CA and serves clients too, and its key."""
    if shutil.which("openssl") is None:
        if os.environ.get("CI"):
            pytest.fail("the openssl command is missing")
        pytest.skip("the openssl command is missing")
    directory = tmp_path_factory.mktemp("tls")
    key, cert = directory / "key.pem", directory / "cert.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=natsrt"
    subprocess.run(
        [*command.split(), "-addext", "subjectAltName=IP:127.0.0.1,DNS:nats.test", "-keyout", key, "-out", cert],
        check=True,
        capture_output=True,
    )
    return cert, key


async def test_tls_with_a_private_ca_and_a_client_certificate_connects(
    certificate: tuple[Path, Path], tmp_path: Path
) -> None:
    cert, key = certificate
    config = write(
        tmp_path / "s.conf", f'tls {{ cert_file: "{cert}", key_file: "{key}", ca_file: "{cert}", verify: true }}\n'
    )
    async with EmbeddedServer(config=config) as server:
        settings: dict[str, Any] = {"servers": server.url, "tls_ca": cert, "tls_cert": cert, "tls_key": key}
        await user_at_server(load(**settings))
        await user_at_server(load(**settings, tls_hostname="nats.test"))
        with pytest.raises(ssl.SSLCertVerificationError, match="(?i)hostname"):
            await user_at_server(load(**settings, tls_hostname="other.test"))
        with pytest.raises(ssl.SSLCertVerificationError, match="self-signed|self signed"):
            await user_at_server(load(servers=server.url))


def test_certificates_that_cannot_be_used_are_refused(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    cert, key = certificate
    bad = write(tmp_path / "bad.pem", "bad")
    with pytest.raises(ConfigurationError, match=f"tls_ca: {bad} cannot be used as CA certificates"):
        Options(tls_ca=bad).connect_kwargs()
    with pytest.raises(ConfigurationError, match=f"tls_cert: {cert} cannot be used with the key {bad}"):
        Options(tls_cert=cert, tls_key=bad).connect_kwargs()
    with pytest.raises(ConfigurationError, match=f"tls_cert: {cert} contains no private key: give tls_key"):
        Options(tls_cert=cert).connect_kwargs()
    assert refused(tls_key=key).problem.startswith("is given without tls_cert")


def test_an_encrypted_key_is_refused_without_asking_at_the_terminal(
    certificate: tuple[Path, Path], tmp_path: Path
) -> None:
    cert, key = certificate
    encrypted = tmp_path / "encrypted.pem"
    subprocess.run(
        ["openssl", "pkcs8", "-topk8", "-in", key, "-out", encrypted, "-passout", "pass:x"],
        check=True,
        capture_output=True,
    )
    with pytest.raises(ConfigurationError, match="the private key is encrypted"):
        Options(tls_cert=cert, tls_key=encrypted).connect_kwargs()


async def test_a_context_that_the_nats_cli_saved_connects(nats_cli: Path, tmp_path: Path) -> None:
    config = write(tmp_path / "s.conf", "authorization { user: me, password: pw }\n")
    environ = {"XDG_CONFIG_HOME": str(tmp_path), "HOME": str(tmp_path)}
    async with EmbeddedServer(config=config) as server:
        subprocess.run(
            [nats_cli, "context", "save", "real", "--server", server.url, "--user", "me", "--password", "pw"],
            env={**os.environ, **environ},
            check=True,
            capture_output=True,
        )
        assert await user_at_server(load(environ, context="real")) == "me"
