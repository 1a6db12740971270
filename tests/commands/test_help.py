"""Test help texts: every flag has one, in whole sentences that say what the flag is."""

import contextlib
import io
import re
from collections.abc import Iterator

import pytest

from mopo_fast.cli import COMMANDS, main
from mopo_fast.config import PENALTIES
from mopo_fast.tasks import BOXES

WIDTH = 100
QUESTIONS = {"What", "Of", "Where", "Whose", "Who", "Whether", "Which", "How"}
# The end of a help text: the default, or a note that the flag is required.
HINT = re.compile(r" ?\((default: .*|required.*)\)$")


def help_of(*arguments: str) -> str:
    # tyro draws boxes only if the encoding of the output has their characters.
    with io.TextIOWrapper(io.BytesIO(), "utf-8") as out, pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(WIDTH))
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stop:
            main([*arguments, "--help"])
        assert stop.value.code == 0
        out.seek(0)
        return out.read()


def entries(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the flags and positional arguments in the boxes of a help, each with the lines of its text."""
    for box in re.findall(r"^╭─.*?^╰─", text, re.MULTILINE | re.DOTALL):
        lines = [line[2:-1].rstrip() for line in box.splitlines()[1:-1]]
        # A line separates the description of a box from its entries.
        first = next((i + 1 for i, line in enumerate(lines) if line.startswith("─")), 0)
        name, words = "", list[str]()
        for line in lines[first:]:
            if not line.startswith(" "):
                if name:
                    yield name, words
                name, _, rest = line.partition("  ")
                words = [rest.strip()] if rest else []
            else:
                words.append(line.strip())
        if name:
            yield name, words


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_is_explained(command: str) -> None:
    found = dict(entries(help_of(command)))
    assert found.pop("-h, --help") == ["show this help message and exit"]
    for name, lines in found.items():
        text = " ".join(lines)
        sentences, hints = HINT.sub("", text), HINT.findall(text)
        assert (
            len(hints) == 1 and hints[0] != "default: " and "None" not in hints[0] and "False" not in hints[0]
        ), f"{name}: {text}"
        assert re.match(r"[A-Z].*\.$", sentences), f"{name}: {text}"
        firsts = {sentence.split()[0].strip(",") for sentence in re.split(r"(?<=[.:;]) ", sentences)}
        assert not {first.capitalize() for first in firsts} & QUESTIONS, f"{name}: {text}"
        assert "by default" not in sentences.lower(), f"{name}: {text}"


@pytest.mark.parametrize("command", COMMANDS)
def test_lines_are_broken_where_they_are_full(command: str) -> None:
    text = help_of(command)
    # An item of a list begins with a dash, on a line of its own.
    for line, following in re.findall(r"^│ ( +\S.*)│\n(?=│  +(?!- )(\S+))", text, re.MULTILINE):
        assert len(line.rstrip()) + 1 + len(following) > WIDTH - 4, line


@pytest.mark.parametrize("command", COMMANDS)
def test_examples_end_the_help_and_name_flags_that_exist(command: str) -> None:
    text, _, examples = help_of(command).partition("\nExamples:\n")
    lines = examples.splitlines()
    assert lines and all(line.startswith("    mopo-fast ") for line in lines)
    for line in lines:
        _, name, *words = line.split()
        shown = text if name == command else help_of(name)
        assert all(f" {word}" in shown for word in words if word.startswith("--")), line


def test_the_list_of_commands_is_short_and_names_completion() -> None:
    text = help_of()
    assert "--tyro-write-completion bash" in text
    for command in COMMANDS.values():
        first, _, rest = (command.__doc__ or "").partition("\n\n")
        assert first.endswith(".") and "\n" not in first
        assert rest.split("\n")[0] not in text


def test_defaults_of_a_preset_are_shown() -> None:
    found = dict(entries(help_of("train", "--preset", "offlinerl-kit")))
    shown = {name.split()[0]: " ".join(lines).rpartition("(")[2] for name, lines in found.items()}
    assert shown["--sac.alpha-max"] == "default: 1.0)"
    assert shown["--sac.order"] == "default: critic_first)"
    assert shown["--rollout.termination"] == "default: offlinerl-kit)"
    assert shown["--horizon"] == "default: tuned for the data set, or 5)"


def test_a_setting_that_is_true_or_false_is_shown_under_its_own_name() -> None:
    names = dict(entries(help_of("train")))
    assert {"--sac.entropy-backup {True,False}", "--evaluation.deterministic {True,False}"} <= set(names)
    assert not [name for name in names if ".no-" in name]


def test_the_help_lists_the_penalties_and_the_termination_rules() -> None:
    found = {name.split()[0]: lines for name, lines in entries(help_of("train"))}
    items = [line.split()[1].rstrip(":") for line in found["--penalty"] if line.startswith("- ")]
    assert tuple(items) == PENALTIES
    words = re.findall(r"[a-z\d-]+", " ".join(found["--rollout.termination"]))
    assert set(BOXES) <= set(words)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_written(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--tyro-write-completion", shell, "-"])
    assert "memory-map" in capsys.readouterr().out
