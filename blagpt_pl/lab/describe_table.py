"""How accounts are shown: one as a page, several beside each other with their differences, or as plain data."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict

from blagpt_pl.lab.account import MEMORY, Account, Fact

NUMBER = 18  # columns


def shown(value: float | None, unit: str, sign: bool = False) -> str:
    """A number as a person reads it."""
    if value is None:
        return "-"
    plus = "+" if sign else ""
    match unit:
        case "bytes":
            return (
                f"{value / 2**20:{plus},.0f} MiB"
                if abs(value) >= 2**20 or not value
                else f"{value / 2**10:{plus}.1f} KiB"
            )
        case "ms":
            return f"{value:{plus},.1f} ms"
        case "h":
            return f"{value:{plus},.2f} h"
        case "share":
            return f"{value:{plus}.1%}"
        case "ratio":
            return f"{value:{plus},.2f}"
        case "FLOP" if abs(value) >= 1e15:
            return f"{value:{plus}.4g}"
        case "times":
            return f"{value:{plus},} times"
        case _:
            return f"{value:{plus},.0f}"


def heading(account: Account) -> str:
    """What the account is of."""
    how = "compiled" if account.compiled else "not compiled"
    ranks = f", {account.ranks} ranks" if account.ranks > 1 else ""
    return (
        f"{type(account.model).__name__}, {account.context} tokens of context, {account.device_batch} sequences a forward"
        f"{ranks}, {account.precision}, {how}"
    )


def single(account: Account, depth: int) -> Iterator[str]:
    """The page of one account, line by line as they are known."""
    yield heading(account)
    yield from modules(account, depth)
    section = ""
    for fact in account.facts():
        if fact.section != section:
            section = fact.section
            yield from ("", title(section, account))
        note = f"  {fact.note}" if fact.note else ""
        yield f"  {fact.name:<28}{shown(fact.value, fact.unit):>{NUMBER}}{note}"
        if fact.section == MEMORY and fact.name == "total" and fact.value is not None:
            yield f"  {account.memory.note}"
            if account.memory.lower_bound:
                yield f"  lower bound: {account.memory.lower_bound}"


def title(section: str, account: Account) -> str:
    """A section's first line."""
    if section == MEMORY and account.memory is not None:
        moment = account.memory.moment(account.device_batch, account.micro_batches)
        return f"{section}, on one device, when it needs most (in the {moment})"
    return f"{section}, {account.ranks} of them" if section.startswith("on ") and account.ranks > 1 else section


def modules(account: Account, depth: int) -> list[str]:
    """The table of modules, and their sums."""
    rows = account.rows(depth)
    names = [f"{'  ' * row.depth}{row.path}" for row in rows]
    wide = max(map(len, (*names, "module"))) + 2
    kinds = max(len(row.kind) for row in rows) + 2
    tokens = account.flops.tokens if account.flops else 1
    head = f"  {'module':<{wide - 2}}{'':<{kinds}}{'parameters':>14}{'FLOPs forward':>18}{'backward, a token':>20}"
    lines = ["", head]
    for name, row in zip(names, rows, strict=True):
        flops = [f"{-(-n // tokens):,}" if n else "" for n in (row.forward, row.backward)]
        size = f"{row.parameters:,}" if row.parameters else "tied" if row.tied else ""
        lines.append(f"{name:<{wide}}{row.kind:<{kinds}}{size:>14}{flops[0]:>18}{flops[1]:>20}".rstrip())
    return lines


def beside(accounts: Mapping[str, Account]) -> list[str]:
    """Several accounts in columns; with two, also their difference."""
    names = list(accounts)
    facts: list[dict[tuple[str, str], Fact]] = [{(f.section, f.name): f for f in a.facts()} for a in accounts.values()]
    keys = list(dict.fromkeys(key for column in facts for key in column))
    sections = list(dict.fromkeys(section for section, _ in keys))
    keys.sort(key=lambda key: sections.index(key[0]))  # what a later column alone has stands in its section
    wide = max(NUMBER, *(len(short(name)) + 2 for name in names))
    lines = [f"{short(name)}: {heading(account)}" for name, account in accounts.items()]
    head = "".join(f"{short(name):>{wide}}" for name in names)
    lines += [
        "",
        f"  {'':<28}{head}{'difference':>{NUMBER}}{'':>9}".rstrip() if len(names) == 2 else f"  {'':<28}{head}",
    ]
    section = ""
    for key in keys:
        if key[0] != section:
            section = key[0]
            lines += ["", section]
        found = [column.get(key) for column in facts]
        unit = next(f.unit for f in found if f is not None)
        values = [None if f is None else f.value for f in found]
        line = f"  {key[1]:<28}" + "".join(f"{shown(value, unit):>{wide}}" for value in values)
        lines.append((line + difference(values, unit)).rstrip())
    notes = dict.fromkeys(f"{f.name}: {f.note}" for column in facts for f in column.values() if bound(f))
    for name, account in accounts.items():
        if account.memory is not None:
            moment = account.memory.moment(account.device_batch, account.micro_batches)
            notes[
                f"{short(name)}: memory is that of one device when it needs most, in the {moment}; {account.memory.note}"
            ] = None
    return [*lines, *(["", *notes] if notes else [])]


def bound(fact: Fact) -> bool:
    """Whether a fact is not the whole truth."""
    return fact.note.startswith(("lower bound", "upper bound", "not "))


def short(name: str) -> str:
    """A column's name: files without their folders and endings."""
    return "+".join(part.rsplit("/", 1)[-1].removesuffix(".yaml") for part in name.split("+"))


def difference(values: list[float | None], unit: str) -> str:
    """Second less first, and in per cent; nothing unless there are two numbers."""
    if len(values) != 2 or None in values:
        return ""
    one, other = values
    if one == other:
        return f"{'=':>{NUMBER}}"
    if unit == "share":
        return f"{f'{100 * (other - one):+.1f} points':>{NUMBER}}"
    share = f"{other / one - 1:+9.1%}" if one else ""
    return f"{shown(other - one, unit, sign=True):>{NUMBER}}{share}"


def as_json(name: str, account: Account, depth: int) -> dict:
    """An account as plain data."""
    facts: dict[str, dict] = {}
    for fact in account.facts():
        facts.setdefault(fact.section, {})[fact.name] = {
            "value": fact.value,
            "unit": fact.unit or "count",
            "note": fact.note,
        }
    modules = [asdict(row) for row in account.rows(depth)]
    return {
        "configuration": name,
        "model": type(account.model).__name__,
        "context": account.context,
        "precision": account.precision,
        "compiled": account.compiled,
        "device": account.device.name,
        "ranks": account.ranks,
        "device_batch_size": account.device_batch,
        "facts": facts,
        "modules": modules,
        "flops_are_of_tokens": account.flops.tokens if account.flops else None,
        "uncounted": account.flops.uncounted if account.flops else None,
    }
