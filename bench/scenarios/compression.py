"""What goes over the wire: bytes per event, alone and in batches, for each encoding."""

from __future__ import annotations

import subprocess
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import orjson
from numpy.typing import NDArray

from bench.dialect import Broker
from bench.events import crm_bodies
from bench.plan import Pace
from bench.runner import Bench, Sample, Subject, run
from bench.scenarios.base import ARRIVED, Bar, Column, Scenario, percent, setting
from bench.servers import CONFIG, Server, ServerError, broker_command
from bench.tools import ROOT
from bench.workload import Workload, even, silent

_TRAINING_SEED, _MEASURED_SEED = 1, 2
"""Different, so that the dictionary is judged by events it has never seen."""
_TRAIN_TIMEOUT = 90.0
"""Samples are written to disk every now and then only."""
_TRAIN_AGAIN = 3.0
_SPACING = 100.0
"""Bursts a second: far enough apart that each is one batch."""


@dataclass(frozen=True, kw_only=True)
class Compression(Scenario):
    """Bytes per CRM-like event on the wire: JSON, deflate, zstd, and zstd with a trained dictionary.

    The broker records events, trains the dictionary itself (``broker
    train-dict``), and is restarted with it. The measured events are others of
    the same kind.
    """

    name: ClassVar = "compression"
    columns: ClassVar = (
        Column("bytes", "B/event alone", ".1f"),
        Column("ratio", "% of JSON", ".1f"),
        Column("batch_bytes", "B/event batched", ".1f"),
        Column("batch_ratio", "% of JSON", ".1f"),
        Column("batch", "events/batch", ".1f"),
        ARRIVED,
    )
    bars: ClassVar = (
        Bar("bytes", 0.35, subject="zstd + dictionary", versus="json"),
        Bar("arrived", 100.0, subject="zstd + dictionary", at_least=True),
    )
    plot: ClassVar = "bytes"
    rivals: ClassVar = ()

    rooms: int = setting(20, "Rooms, with one session each.")
    events: int = setting(2_000, "Events measured alone, and again in batches.")
    burst: int = setting(16, "Events published at once for a batch.")
    rate: float = setting(400.0, "Single events a second.")
    training: int = setting(4_000, "Events the dictionary is trained on.")

    def measure(self, bench: Bench) -> list[Sample]:
        if not bench.with_broker:
            bench.display.note("compression measures only the broker")
            return []
        with tempfile.TemporaryDirectory(prefix="bench-") as data:
            storing = ["--data", data, "--set", "rooms.bench.record=true"]
            subjects = [
                Subject("json", "broker", Broker("json")),
                Subject("deflate", "broker", Broker("deflate")),
            ]
            subjects.append(Subject("zstd", "broker", Broker("zstd")))
            try:
                dictionaries = self._train(bench, data, storing)
            except ServerError as error:
                bench.display.note(f"no dictionary: {error}")
            else:
                trained = Broker("zstd", dictionary=max(dictionaries), dictionaries=dictionaries)
                subjects.append(Subject("zstd + dictionary", "broker", trained))
            samples = bench.alternate(
                subjects, lambda subject, repeat: self._one(bench, subject, repeat, storing)
            )
        _add_ratios(samples)
        return samples

    def _one(self, bench: Bench, subject: Subject, repeat: int, storing: list[str]) -> Sample:
        metrics: dict[str, float] = {}
        single = self._workload(even(self.rate, self.events / self.rate), 1, _MEASURED_SEED)
        bursts = self.events // self.burst
        moments = even(_SPACING, bursts / _SPACING)
        batched = self._workload(np.repeat(moments, self.burst), self.burst, _MEASURED_SEED)
        with bench.server(subject, storing) as server:
            for prefix, workload in (("", single), ("batch_", batched)):
                done = run(bench, server, subject.dialect, workload, Pace())
                verdict = done.verdict
                metrics[f"{prefix}bytes"] = verdict.payload_bytes / max(1, verdict.arrived)
                metrics["batch"] = verdict.arrived / max(1, verdict.frames)
        arrived = verdict.arrival()
        return done.sample(subject.label, repeat, arrived=arrived, **metrics)

    def _workload(self, at: NDArray[np.uint64], burst: int, seed: int) -> Workload:
        """Each burst goes to the next room, from the session that is in it."""
        room = (np.arange(len(at)) // burst % self.rooms).astype(np.int32)
        return Workload(
            rooms=[f"bench:deal-{1000 + 37 * index}" for index in range(self.rooms)],
            member=np.arange(self.rooms, dtype=np.int32),
            at=at,
            publisher=room,
            room=room,
            bodies=crm_bodies(len(at), seed),
        )

    def _train(self, bench: Bench, data: str, storing: list[str]) -> dict[int, bytes]:
        """Let the broker record events and train; returns the dictionaries it then serves."""
        bench.display.step("training a dictionary")
        moments = even(1_000.0, self.training / 1_000.0)
        workload = self._workload(moments, 1, _TRAINING_SEED)
        with Server("broker", bench.server_core, storing) as server:
            run(bench, server, Broker("json"), workload, Pace())
            _train_dict(data)
        with Server("broker", bench.server_core, storing) as server:
            return _dictionaries(bench, server)


def _train_dict(data: str) -> None:
    """Run ``broker train-dict`` beside the running broker, until it has written down what it recorded."""
    program = broker_command()[0]
    command = [program, "train-dict", "--config", str(CONFIG), "--room", "bench:*", "--data", data]
    deadline = time.monotonic() + _TRAIN_TIMEOUT
    while True:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TRAIN_TIMEOUT, cwd=ROOT, check=False
        )
        if done.returncode == 0:
            return
        if time.monotonic() > deadline:
            raise ServerError(f"broker train-dict: {done.stderr.strip()[-300:]}")
        time.sleep(_TRAIN_AGAIN)


def _dictionaries(bench: Bench, server: Server) -> dict[int, bytes]:
    """What the welcome offers, fetched as a client would."""
    dialect = Broker("zstd")  # offered to those only who can use them
    done = run(bench, server, dialect, silent(1), Pace())
    offers = orjson.loads(dialect.plain(*done.recording.payload(0)))[0].get("dicts", [])
    if not offers:
        raise ServerError("the broker offers none in its welcome")
    dictionaries = {}
    for offer in offers:
        address = f"http://127.0.0.1:{server.port}{offer['url']}"
        with urllib.request.urlopen(address, timeout=5) as answer:
            dictionaries[int(offer["id"])] = answer.read()
    return dictionaries


def _add_ratios(samples: list[Sample]) -> None:
    """Each sample's bytes in percent of JSON's, in the same repeat."""
    plain = {sample.repeat: sample.metrics for sample in samples if sample.subject == "json"}
    for sample in samples:
        base = plain.get(sample.repeat, {})
        for key, ratio in (("bytes", "ratio"), ("batch_bytes", "batch_ratio")):
            if key in sample.metrics and key in base:
                sample.metrics[ratio] = percent(sample.metrics[key], base[key])
