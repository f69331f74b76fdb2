"""What `inspect` shows of replayed steps: a table and coloured text on a terminal, or an HTML page.

The text can come from anywhere, so it is always treated as plain text: a page escapes it, and a terminal shows control
characters (which could move the cursor or hide a line) as their codes.
"""

import html
import json
import unicodedata
from typing import Any

_SHOWN = 4  # windows shown on a terminal
_ON_A_PAGE = 64  # windows shown on a page
_SHADES = (  # the nats that a loss is below; background and foreground in 256 colours, from expected to astonishing
    (0.5, "48;5;194;38;5;16"),
    (1.5, "48;5;229;38;5;16"),
    (3.0, "48;5;222;38;5;16"),
    (5.0, "48;5;215;38;5;16"),
    (8.0, "48;5;209;38;5;16"),
    (float("inf"), "48;5;197;38;5;231"),
)
_DARKEST = 8.0  # nats from which a page uses the full colour


def lines(found: list[dict[str, Any]], colour: bool) -> str:
    """Replayed steps (see `replay.inspected`) for a terminal: a table, two of them side by side, then their text."""
    out = [f"{name:16}" + "".join(f"{value:>22}" for value in values) for name, values in _table(found)]
    for each in found:
        if verification := each["verification"]:
            out += ["", f"step {each['step']}: {verdict(verification)}"]
    shown = found[:1] if any("set" in each for each in found) else found  # both have the same windows
    for each in shown:
        out += ["", f"step {each['step']}, the most surprising tokens (nats, token, text before it, document):"]
        out += [
            f"  {token['loss']:6.2f}  {_quoted(token['token']):16}  {_quoted(token['before'][-40:])}  "
            f"{visible(token['document'])}, token {token['offset']:,}"
            for token in each["surprising"]
        ]
        for sequence in each["sequences"][:_SHOWN]:
            out += ["", f"block {sequence['block']}: {visible(_sources(sequence))}", _text(sequence, colour)]
        if (rest := len(each["sequences"]) - _SHOWN) > 0:
            out += ["", f"and {rest} more windows; --html and --json have them"]
    return "\n".join(out)


def verdict(verification: dict[str, Any]) -> str:
    """Whether the replayed loss equals the logged one, in words."""
    if verification["logged"] is None and verification["verdict"] == "bits":
        return "neither the replayed loss nor the logged one is finite"
    kind = f" (the run was on {', '.join(verification['kind'])})" if verification["kind"] else ""
    if verification["verdict"] == "bits":
        return f"the replayed loss equals the logged one bit for bit, {verification['logged']}{kind}"
    off = verification["difference"]
    how_far = f"{off:.1e} relative" if off is not None else "one is not finite"
    if verification["verdict"] == "rounding":
        return f"the replayed loss equals the logged one, {verification['logged']}, up to rounding: {how_far}{kind}"
    return (
        f"THE REPLAYED LOSS IS NOT THE LOGGED ONE, {verification['logged']}: {how_far}{kind}; settings, "
        "data or code have changed since"
    )


def _table(found: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """Rows of a name and its values, one for each replayed step."""

    def row(name: str, of: Any) -> tuple[str, list[str]]:
        return name, [of(each) for each in found]

    def number(value: Any) -> str:
        return "-" if value is None else f"{value:.6g}"

    rows = [
        row("step", lambda each: f"{each['step']:,}"),
        row("replayed from", lambda each: f"step {each['from_step']:,}" if each["from_step"] else "the beginning"),
        row("loss", lambda each: number(each["loss"])),
        row("learning rate", lambda each: number(each["learning_rate"])),
        row("gradient norm", lambda each: number(each["grad_norm"]) + (", clipped" if each["clipped"] else "")),
        row("targets", lambda each: f"{each['targets']:,}"),
        row("loss, no dropout", lambda each: number(each["loss_before"])),
        row("... after it", lambda each: number(each["loss_after"]) + ("" if each["taken"] else ", skipped")),
    ]
    if any("set" in each for each in found):
        rows.insert(1, row("with", lambda each: visible(", ".join(each.get("set", ["the run's settings"])))))
    layers = [each["statistics"] and each["statistics"]["layers"] for each in found]
    for key, title in (("grad_norm", "gradient norm"), ("update_ratio", "update / weight")):
        rows += [("", [""] * len(found)), (title, [""] * len(found))]
        for layer in map(str, range(max((len(each) for each in layers if each), default=0))):
            rows.append((f"  layer {layer}", [number(each and each[layer][key]) for each in layers]))
    return rows


def _sources(sequence: dict[str, Any]) -> str:
    """The documents of a window's tokens, in words."""
    return ", ".join(
        f"{each['name']} from token {each['offset']:,} ({each['tokens']:,})" for each in sequence["documents"]
    )


def _text(sequence: dict[str, Any], colour: bool) -> str:
    """A window's text; with `colour`, each token is coloured by its loss."""
    pieces = []
    for token, loss in zip(sequence["tokens"], sequence["losses"], strict=True):
        text = visible(token)
        if colour and loss is not None and text:
            shade = next(code for limit, code in _SHADES if loss < limit or limit == float("inf"))
            # Colour each line separately, or the colour would run to the window's edge.
            text = "\n".join(f"\x1b[{shade}m{part}\x1b[0m" if part else "" for part in text.split("\n"))
        pieces.append(text)
    return "".join(pieces)


def visible(text: str) -> str:
    """Text in which control characters (except new lines and tabs) and direction marks appear as their codes."""
    return "".join(
        f"\\u{ord(char):04x}" if unicodedata.category(char) in ("Cc", "Cf", "Cs") and char not in "\n\t" else char
        for char in text
    )


def _quoted(text: str) -> str:
    return visible(json.dumps(text, ensure_ascii=False))


def page(found: list[dict[str, Any]], title: str) -> str:
    """Replayed steps as one HTML page that loads nothing from anywhere, light or dark like the reader's system."""
    body = [f"<h1>{_escaped(title)}</h1>"]
    for each in found:
        if verification := each["verification"]:
            mark = "bad" if verification["verdict"] == "different" else "good"
            body.append(f'<p class="{mark}">step {each["step"]}: {_escaped(verdict(verification))}</p>')
    rows = (
        (name, "".join(f"<td>{_escaped(value)}</td>" for value in values)) for name, values in _table(found) if name
    )
    body += ["<table>", *(f"<tr><th>{_escaped(name)}</th>{cells}</tr>" for name, cells in rows), "</table>"]
    for each in found[:1] if any("set" in each for each in found) else found:
        body.append(f"<h2>Step {each['step']}: the most surprising tokens</h2><table>")
        body.append("<tr><th>nats</th><th>token</th><th>after</th><th>document</th></tr>")
        body += [
            f"<tr><td>{token['loss']:.2f}</td><td><code>{_escaped(_quoted(token['token']))}</code></td>"
            f"<td><code>{_escaped(_quoted(token['before']))}</code></td>"
            f"<td>{_escaped(token['document'])}, token {token['offset']:,}</td></tr>"
            for token in each["surprising"]
        ]
        body.append(f"</table><h2>Step {each['step']}: what it read, coloured by each token's loss</h2>")
        for sequence in each["sequences"][:_ON_A_PAGE]:
            body.append(f"<h3>block {sequence['block']}: {_escaped(_sources(sequence))}</h3><pre>")
            body += [
                _span(token, loss) for token, loss in zip(sequence["tokens"], sequence["losses"], strict=True) if token
            ]
            body.append("</pre>")
        if (rest := len(each["sequences"]) - _ON_A_PAGE) > 0:
            body.append(f"<p>and {rest} more windows; --json has them</p>")
    return _PAGE.replace("TITLE", _escaped(title), 1).replace("BODY", "".join(body), 1)


def _span(token: str, loss: float | None) -> str:
    """A token as HTML, shaded by its loss."""
    if loss is None:
        return f"<span>{_escaped(token)}</span>"
    share = round(100 * min(1.0, loss / _DARKEST))
    return f'<span style="--l:{share}%" title="{loss:.3f} nats">{_escaped(token)}</span>'


def _escaped(text: str) -> str:
    return html.escape(visible(text), quote=True)


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>TITLE</title>
<style>
:root { color-scheme: light dark; --back: #fff; --ink: #1b1b1f; --line: #d8d8de; --hot: #ff7a45; --good: #18794e;
  --bad: #c62a2f; }
@media (prefers-color-scheme: dark) { :root { --back: #16161a; --ink: #e8e8ec; --line: #3a3a42; --hot: #b0441a;
  --good: #4cc38a; --bad: #ff6369; } }
body { background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; max-width: 70em;
  margin: 2em auto; padding: 0 1em; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid var(--line); padding: .2em .8em; text-align: left; vertical-align: top; }
h3 { font-size: 1em; overflow-wrap: anywhere; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--line); padding: .8em; }
span { background: color-mix(in srgb, var(--hot) var(--l, 0%), transparent); }
.good { color: var(--good); } .bad { color: var(--bad); font-weight: bold; }
</style>
BODY
</html>
"""
