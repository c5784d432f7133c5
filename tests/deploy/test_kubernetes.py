"""config/deploy/kubernetes.yaml: parts that fit each other, and what they run does what they say."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import trio

from broker.config import Config
from broker.settings_loader import load
from tests.admin.harness import TOKEN, running
from tests.deploy.small_yaml import YamlError, parse

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "config" / "deploy" / "kubernetes.yaml").read_text()
DOCUMENTS = parse(TEXT)


def the(kind: str, name: str = "broker") -> Any:
    (found,) = [each for each in DOCUMENTS if each["kind"] == kind and each["metadata"]["name"] == name]
    return found


POD = the("Deployment")["spec"]["template"]
(CONTAINER,) = POD["spec"]["containers"]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda each: each["kind"])
def test_every_document_says_what_it_is(document: Any) -> None:
    versions = {
        "ConfigMap": "v1",
        "Deployment": "apps/v1",
        "Service": "v1",
        "HorizontalPodAutoscaler": "autoscaling/v2",
        "PodDisruptionBudget": "policy/v1",
    }
    assert document["apiVersion"] == versions[document["kind"]]
    assert document["metadata"]["labels"] == {"app": "broker"}


def test_selectors_find_the_pods() -> None:
    labels = POD["metadata"]["labels"]
    assert the("Deployment")["spec"]["selector"]["matchLabels"] == labels
    assert the("PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == labels
    for name in ("broker", "broker-operators"):
        assert the("Service", name)["spec"]["selector"] == labels
    target = the("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert (target["kind"], target["apiVersion"], target["name"]) == ("Deployment", "apps/v1", "broker")


@pytest.fixture
def settings(tmp_path: Path) -> Config:
    """The file of the ConfigMap, with the variables that the pod has."""
    assert {each["name"] for each in CONTAINER["env"]} == {"BROKER_NODE"}
    environment = {
        "BROKER_ADMIN_TOKEN": "secret",
        "BROKER_REDIS_URL": "redis://redis:6379/0",
        "BROKER_NODE": "broker-1",
    }
    file = tmp_path / "broker.toml"
    file.write_text(the("ConfigMap")["data"][file.name])
    return load(file, env=environment, flags={})


def test_ports_and_probes_are_those_of_the_broker(settings: Config) -> None:
    ports = {each["name"]: each["containerPort"] for each in CONTAINER["ports"]}
    assert ports == {"clients": settings.server.port, "operators": settings.admin.port}
    for name, port in (("broker", "clients"), ("broker-operators", "operators")):
        (only,) = the("Service", name)["spec"]["ports"]
        assert (only["port"], only["targetPort"]) == (ports[port], port)
    paths = {name: CONTAINER[name]["httpGet"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert {each["port"] for each in paths.values()} == {"operators"}
    assert paths["readinessProbe"]["path"] == "/readyz"
    assert paths["livenessProbe"]["path"] == paths["startupProbe"]["path"] == "/healthz"


def test_the_pod_has_time_to_drain(settings: Config) -> None:
    found = settings.server
    pause = 5
    assert f"time.sleep({pause})" in hook()
    assert POD["spec"]["terminationGracePeriodSeconds"] > pause + found.drain_timeout + found.close_timeout
    assert the("Deployment")["spec"]["minReadySeconds"] > found.retry_after


def test_nothing_in_the_pod_looks_like_a_setting() -> None:
    assert POD["spec"]["enableServiceLinks"] is False


def hook() -> str:
    program, option, code = CONTAINER["lifecycle"]["preStop"]["exec"]["command"]
    assert (program, option) == ("python3", "-c")
    return str(code)


async def test_the_hook_drains() -> None:
    async with running() as node, node.session() as session:
        code = hook().replace("time.sleep(5)", "pass").replace("127.0.0.1:8766", f"127.0.0.1:{node.port}")
        done = await trio.run_process(
            [sys.executable, "-c", code],
            env={"BROKER_ADMIN_TOKEN": TOKEN},
            capture_stderr=True,
            capture_stdout=True,
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert (await session.next("bye"))["code"] == 4503
        assert not node.broker.ready


# -- the reader itself ----------------------------------------------------------------


SAMPLE = """\
a: 1
# said
b:
  - c: "x # y"
    d: ["p", 2]
  - e f
g: |
  one

    two
h: true
---
i:
  j: k:l
"""
BAD = [
    "a: 1\na: 2",
    "a:\n\tb: 1",
    "a: {b: 1}",
    "a: b: c",
    "a:\n",
    "a: 1\n  b: 2",
    "- x\nb: 1",
    "a: &x 1",
]


def test_what_is_read() -> None:
    assert parse(SAMPLE) == [
        {"a": 1, "b": [{"c": "x # y", "d": ["p", 2]}, "e f"], "g": "one\n\n  two\n", "h": True},
        {"i": {"j": "k:l"}},
    ]


@pytest.mark.parametrize("text", BAD)
def test_what_is_not_of_it_is_an_error(text: str) -> None:
    with pytest.raises(YamlError):
        parse(text)
