"""The command line: what is printed where, and how it ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from broker import __version__
from broker.auth.tokens import TokenVerifier
from broker.cli import broker, main
from broker.cli_options import Duration, Exit, Json, json_text, word
from broker.protocol.events import make_event
from broker.protocol.samples import SampleRecorder
from broker.settings_loader import load

ROOT = Path(__file__).parent.parent
DEV = str(ROOT / "config" / "dev.toml")
COMMANDS = ["serve", "check-config", "token", "listen", "export", "publish", "stats", "train-dict", "version"]


def call(*args: str, env: dict[str, str | None] | None = None) -> Result:
    clean: dict[str, str | None] = {name: None for name in os.environ if name.startswith("BROKER_")}
    return CliRunner().invoke(broker, args, env=clean | (env or {}))


def process(*args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("BROKER_")}
    return subprocess.run(
        [sys.executable, "-m", "broker", *args],
        env=clean | (env or {}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


# --- Help -------------------------------------------------------------------------


def test_help_names_every_command() -> None:
    result = call("--help")
    assert result.exit_code == Exit.OK
    for name in COMMANDS:
        assert f"\n  {name} " in result.output


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str) -> None:
    result = call(name, "-h")
    assert result.exit_code == Exit.OK
    assert "Examples:\n    broker" in result.output or "    jq" in result.output
    assert "Exit codes:" in result.output


def test_serve_offers_every_setting() -> None:
    output = call("serve", "--help").output
    for option in (
        "--host",
        "--port",
        "--admin-port",
        "--data",
        "--dev",
        "--tls-cert",
        "--redis",
        "--workers",
        "--limits-outbox-bytes",
        "--set",
    ):
        assert option in output
    assert (
        output.index("--port") < output.index("Every other setting:") < output.index("--limits-outbox-bytes")
    )
    assert "BROKER_LIMITS_OUTBOX_BYTES" in output


def test_an_unknown_command_is_a_matter_of_usage() -> None:
    assert call("srve").exit_code == Exit.USAGE


@pytest.mark.parametrize("args", [["version"], ["--version"]])
def test_version(args: list[str]) -> None:
    assert __version__ in call(*args).output


# --- serve, as far as it does not start ------------------------------------------------


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--public-port", "80"], "--public-port is not in this version"),
        (["--workers", "2"], "flag --workers: server.workers: 2 processes share their rooms through Redis"),
        (["--workers", "0"], "flag --workers: server.workers: 0 (integer) is out of range"),
        (["--redis", "x\x07"], "flag --redis: redis.url: a hidden value (string) holds a control character"),
        (["--port", "x"], "flag --port: server.port: "),
        (["--server-port", "70000"], "flag --port: server.port: 70000"),
        (["--host", "0.0.0.0"], "dev lets everybody in"),
        (["--set", "rooms.deal.history"], "has no '='; write KEY=VALUE"),
        (["--set", "rooms.deal.histori=1"], "did you mean history?"),
        (["--limits-outbox-byte", "1"], "--limits-outbox-bytes"),
    ],
)
def test_what_serve_refuses(args: list[str], sentence: str) -> None:
    result = call("serve", "--dev", *args)
    assert result.exit_code == Exit.USAGE
    assert sentence in result.stderr
    assert result.stdout == ""


def test_a_bad_configuration_ends_the_process_with_2_and_one_line_each(tmp_path: Path) -> None:
    path = tmp_path / "broker.toml"
    path.write_text("[server]\nprot = 1\nport = 'x'\n")
    done = process("serve", "--config", str(path), env={"BROKER_DEV": "yes"})
    assert done.returncode == Exit.USAGE
    assert done.stdout == ""
    first, second = done.stderr.splitlines()
    assert first == f"{path}: server.prot: unknown key; did you mean port?"
    assert second.startswith(f"{path}: server.port: ")


def test_serve_imports_no_tool_of_the_other_commands() -> None:
    code = (
        "import sys, broker.cli as cli; cli.broker.commands['serve'].get_params;"
        "bad = {'rich', 'httpx', 'structlog', 'trio_websocket', 'jwt', 'wsproto'} & set(sys.modules);"
        "sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


# --- check-config -----------------------------------------------------------------------


def test_check_config_says_what_is_in_effect() -> None:
    result = call(
        "check-config", "--config", DEV, "--port", "0", "--no-server-echo", "--set", "rooms.deal.slots=7"
    )
    assert result.exit_code == Exit.OK
    lines = result.stdout.splitlines()
    assert lines[0] == "ok"
    assert "clients   ws://127.0.0.1:0/ws" in lines
    assert "changed   server.port = 0" in lines
    assert "changed   server.echo = true" not in lines
    assert any(line.startswith("rooms     deal: join anyone") for line in lines)


def test_check_config_finds_the_file_in_the_environment() -> None:
    assert call("check-config", env={"BROKER_CONFIG": DEV}).exit_code == Exit.OK
    result = call("check-config", env={"BROKER_CONFIG": "/nowhere.toml"})
    assert result.exit_code == Exit.USAGE
    assert "/nowhere.toml: file: cannot be read: No such file or directory" in result.stderr


def test_check_config_tells_the_manual_file_what_it_lacks() -> None:
    result = call("check-config", "--config", str(ROOT / "config" / "broker.toml"))
    assert result.exit_code == Exit.OK
    assert result.stdout.startswith("ok\n")
    assert "warning: auth.keys: there is no key and anonymous sessions are off" in result.stderr
    assert "[[auth.keys]]" in result.stderr


def test_colours_only_where_they_are_wanted(tmp_path: Path) -> None:
    """A pseudo-terminal, so that colours would be shown."""
    for variables, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
        leader, follower = os.openpty()
        clean = {name: value for name, value in os.environ.items() if name not in {"NO_COLOR", "FORCE_COLOR"}}
        try:
            subprocess.run(
                [sys.executable, "-m", "broker", "check-config", "--config", DEV],
                env=clean | variables,
                stdout=follower,
                timeout=60,
                check=True,
            )
            assert (b"\x1b[" in os.read(leader, 4096)) is coloured
        finally:
            os.close(leader)
            os.close(follower)


# --- token -------------------------------------------------------------------------------


async def test_a_token_is_printed_alone_and_accepted() -> None:
    result = call(
        "token",
        "--config",
        DEV,
        "--user",
        "42",
        "--ttl",
        "2h",
        "--join",
        "deal:*",
        "--publish",
        "deal:7",
        "--info",
        '{"n": 1}',
    )
    assert result.exit_code == Exit.OK
    (token,) = result.stdout.split()
    config = load(Path(DEV), env={}, flags={})
    verifier = TokenVerifier(config.auth, dev=True)
    identity = await verifier.verify(token)
    assert identity.user == "42"
    assert identity.info == {"n": 1}


@pytest.mark.parametrize(
    ("args", "code", "sentence"),
    [
        (["--dev"], Exit.USAGE, "--user"),
        (["--dev", "--user", "a*"], Exit.USAGE, "would be refused"),
        (
            ["--dev", "--user", "1", "--ttl", "soon"],
            Exit.USAGE,
            "'soon' is no duration; write 90, 15m, 1h or 7d",
        ),
        (["--dev", "--user", "1", "--info", "{"], Exit.USAGE, "not JSON"),
        (["--user", "1"], Exit.USAGE, "auth.keys"),
    ],
)
def test_what_token_refuses(args: list[str], code: Exit, sentence: str) -> None:
    result = call("token", *args)
    assert result.exit_code == code
    assert sentence in result.stderr


def test_a_public_key_cannot_sign(tmp_path: Path) -> None:
    path = tmp_path / "broker.toml"
    path.write_text("[[auth.keys]]\nalgorithm = 'RS256'\njwks = 'https://login.example.com/jwks.json'\n")
    result = call("token", "--config", str(path), "--user", "1")
    assert result.exit_code == Exit.USAGE
    assert "no key here can sign a token" in result.stderr


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90.0), ("1.5s", 1.5), ("15m", 900.0), ("1h", 3600.0), ("7d", 604800.0)]
)
def test_durations(text: str, seconds: float) -> None:
    assert Duration().convert(text, None, None) == seconds


@pytest.mark.parametrize("text", ["", "0", "-1", "1w", "1 h", "4000d", "nan", "1e3", "\u0663"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(click.BadParameter):
        Duration().convert(text, None, None)


def test_json_values() -> None:
    assert Json().convert('{"a": 1}', None, None) == {"a": 1}
    with pytest.raises(click.BadParameter):
        Json().convert("[" * 10_000, None, None)


def test_what_is_shown_is_safe_to_show() -> None:
    assert json_text({"a": "ü"}) == '{"a": "ü"}'
    assert json_text("\x9b[31m") == '"\\u009b[31m"'
    assert word("deal-updated") == "deal-updated"
    assert word("two words") == '"two words"'
    assert word("\x1b") == '"\\u001b"'
    assert word("") == '""'
    assert word(None) == "null"


# --- train-dict ---------------------------------------------------------------------------


def record(folder: Path, events: int) -> None:
    recorder = SampleRecorder(folder, 2000, seed=1)
    for number in range(events):
        event = make_event(f"deal:{number % 7}", "deal-updated", {"id": number, "stage": "won"}, 1.0)
        recorder.offer("deal", event.wire)
    recorder.flush()


def test_a_dictionary_is_trained_from_what_was_recorded(tmp_path: Path) -> None:
    record(tmp_path, 500)
    result = call("train-dict", "--data", str(tmp_path), "--room", "deal:*", "--size", "2048")
    assert result.exit_code == Exit.OK, result.stderr
    assert "for deal:*: " in result.stdout
    assert len(list((tmp_path / "dictionaries").glob("*.dict"))) == 1


def test_training_asks_for_nothing_that_only_serving_needs(tmp_path: Path) -> None:
    record(tmp_path, 500)
    path = tmp_path / "broker.toml"
    text = "[server]\ntls_key = '/secret.pem'\n[[auth.keys]]\nalgorithm = 'RS256'\nfile = '/secret.pem'\n"
    path.write_text(text)
    words = ("--config", str(path), "--data", str(tmp_path))
    assert "/secret.pem" in call("check-config", *words).stderr
    result = call("train-dict", *words, "--room", "deal:*")
    assert result.exit_code == Exit.OK, result.stderr
    path.write_text(f"{text}[wire]\nzstd_level = 'high'\n")
    result = call("train-dict", *words, "--room", "deal:*")
    assert result.exit_code == Exit.USAGE
    assert "wire.zstd_level: " in result.stderr
    assert "/secret.pem" not in result.stderr


def test_training_needs_a_store_and_events(tmp_path: Path) -> None:
    result = call("train-dict", "--room", "deal:*")
    assert result.exit_code == Exit.USAGE
    assert "store.data is not set" in result.stderr
    record(tmp_path, 5)
    (tmp_path / "samples" / "broken.jsonl.zst").write_bytes(b"x")
    result = call("train-dict", "--data", str(tmp_path), "--room", "deal:*")
    assert result.exit_code == Exit.FAILED
    assert "only 5 different events" in result.stderr
    assert "broken.jsonl.zst" in result.stderr


# --- How main ends ---------------------------------------------------------------------------


def ending(monkeypatch: pytest.MonkeyPatch, command: click.Command) -> int | str | None:
    monkeypatch.setitem(broker.commands, "version", command)
    with pytest.raises(SystemExit) as caught:
        main(["version"])
    return caught.value.code


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyboardInterrupt(), Exit.INTERRUPTED),
        (click.Abort(), Exit.INTERRUPTED),
        (click.ClickException("no"), Exit.FAILED),
        (click.UsageError("no"), Exit.USAGE),
        (SystemExit(4), Exit.REFUSED),
    ],
)
def test_endings(error: BaseException, code: Exit, monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def ends() -> None:
        raise error

    assert ending(monkeypatch, ends) == code


def test_a_command_that_returns_ends_with_0(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ending(monkeypatch, click.Command("quiet", callback=lambda: None)) == Exit.OK


@pytest.mark.parametrize("args", [["serve", "--help"], ["version"]])  # more and less than a buffer
def test_a_reader_that_goes_away_is_no_error_message(args: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "broker", *args],
            stdout=write,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (Exit.PIPE, b"")
