"""The page at ``/``: what a person wants to see first. Plain HTML, made here, without a script.

Everything that is shown passes :func:`html.escape`; the policy in ``HEADERS``
would keep a script from running even if something slipped through.
"""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any, Final

from broker.admin.statistics import Statistics, flat

REFRESH_SECONDS: Final = 5

_STYLE: Final = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;"
    "color:#1a202c;background:#fff}"
    "h1{font-size:1.4rem}h2{font-size:1rem;margin:1.5rem 0 .3rem;color:#4a5568}"
    "main{display:grid;grid-template-columns:repeat(auto-fit,minmax(17rem,1fr));gap:0 2.5rem}"
    "table{border-collapse:collapse;width:100%}th{text-align:left;font-weight:400}"
    "td{text-align:right;font-variant-numeric:tabular-nums}tr{border-bottom:1px solid #edf2f7}"
    ".bad{color:#c53030}"
    "@media(prefers-color-scheme:dark){body{color:#e2e8f0;background:#1a202c}"
    "tr{border-color:#2d3748}h2{color:#a0aec0}a{color:#90cdf4}}"
)
_STYLE_HASH: Final = b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()

HEADERS: Final = {
    "Content-Security-Policy": (
        f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
}


def page(found: Statistics) -> str:
    """The overview of one snapshot."""
    state = "ready" if found.ready else '<strong class="bad">not ready</strong>'
    tables = "".join(
        (
            _table("Now", _now(found)),
            _table("Since the start", _since(found)),
            _table("Latency (50 % / 99 % within)", _latencies(found)),
            _table("Closed sessions, by code", found.registry["closes"].items()),
            _table("Refused connections", found.registry["refused"].items()),
            _table("Error replies", found.registry["errors"].items()),
            _table("Engine", found.engine.items()),
            _table("Other nodes", found.peers.items()),
            _table("Cluster", flat(found.cluster)),
        )
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="refresh" content="{REFRESH_SECONDS}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(found.node)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{escape(found.node)}</h1><p>broker {escape(found.version)}, {state}, "
        f"up {escape(duration(found.uptime))}</p><main>{tables}</main>"
        '<p><a href="/api/stats">statistics</a> · <a href="/api/rooms?sort=members">rooms</a> · '
        '<a href="/api/sessions">sessions</a> · <a href="/api/nodes">nodes</a> · '
        '<a href="/api/load">load</a> · <a href="/metrics">metrics</a> · '
        '<a href="/openapi.json">API</a></p></body></html>'
    )


def duration(seconds: float) -> str:
    """A time span for people."""
    minutes, left = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (left, "s")]
    while len(parts) > 1 and not parts[0][0]:
        parts.pop(0)
    return " ".join(f"{value} {unit}" for value, unit in parts[:2])


def _now(found: Statistics) -> Iterable[tuple[str, Any]]:
    process = found.process
    return (
        ("sessions", found.registry["sessions"]),
        ("users", found.registry["users"]),
        ("connections", found.registry["connections"]),
        ("rooms", found.hub["rooms"]),
        ("load, of 1", found.load["load"]),
        ("bytes queued for slow readers", found.traffic.queued_bytes),
        ("resident memory, MB", round(process.rss_bytes / 1e6, 1)),
        ("descriptors", f"{process.descriptors:,} of {process.descriptor_limit:,}"),
    )


def _since(found: Statistics) -> Iterable[tuple[str, Any]]:
    hub: Mapping[str, Any] = found.hub
    return (
        ("sessions opened", found.registry["opened"]),
        ("events published", hub["published"]),
        ("deliveries", hub["deliveries"]),
        ("events dropped", hub["dropped"]),
        ("bytes read", found.traffic.bytes_read),
        ("CPU seconds", round(found.process.cpu_seconds, 1)),
    )


def _latencies(found: Statistics) -> Iterable[tuple[str, Any]]:
    return (
        (name.replace("_", " "), f"{_milliseconds(stage.p50)} / {_milliseconds(stage.p99)}")
        for name, stage in found.stages.items()
        if stage.count
    )


def _milliseconds(seconds: float | None) -> str:
    return f"{seconds * 1000:g} ms" if seconds is not None else "more"


def _table(title: str, rows: Iterable[tuple[str, Any]]) -> str:
    shown = "".join(
        f"<tr><th>{escape(str(name))}</th><td>{escape(_shown(value))}</td></tr>" for name, value in rows
    )
    return f"<section><h2>{escape(title)}</h2><table>{shown}</table></section>" if shown else ""


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, (int, float)) else str(value)
