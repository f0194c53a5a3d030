"""The history of a chat and the commands that change it. It does not know the terminal."""

from collections import Counter
from typing import Any, Final

from specserve.cli.chat_screen import Screen
from specserve.client import (
    Client,
    Completion,
    Options,
    SpecserveError,
    SpeculationReport,
    SpeculativeDecoding,
)

HELP: Final = """\
/retry        generate the last answer again
/clear        delete the history
/system TEXT  set the system message; without TEXT: none
/stats        speed and acceptance of the last answer
/exit         leave; Ctrl-D does too
A line that starts with a space is always a message. Ctrl-C stops an answer."""


class Conversation:
    """The state of a chat. Each prompt is sent together with all earlier turns."""

    def __init__(
        self, client: Client, screen: Screen, options: Options, system: str | None
    ) -> None:
        self._client = client
        self._screen = screen
        self._options = options
        self._system = system
        self._turns: list[tuple[str, str]] = []  # (prompt, answer)
        self._asked: str | None = None
        self._answered = False  # whether the last turn is the answer to `_asked`
        self._last: Completion | None = None

    def enter(self, line: str) -> bool:
        """Send a prompt or run a command. Returns False if the user leaves.

        If an answer fails or is interrupted, the text shown so far is kept as the answer. Raises
        SpecserveError and KeyboardInterrupt.
        """
        if not line.startswith("/"):
            if line.strip():
                self._ask(line.strip())
            return True
        command, _, text = line.strip().partition(" ")
        match command:
            case "/retry":
                self._retry()
            case "/clear":
                self._clear()
            case "/system":
                self._system = text.strip() or None
                self._screen.note("system message set" if self._system else "no system message")
            case "/stats":
                self._stats()
            case "/help":
                self._screen.note(HELP)
            case "/exit" | "/quit":
                return False
            case _:
                self._screen.note(f"{command} is not a command; /help lists all")
        return True

    def _ask(self, prompt: str) -> None:
        self._asked, self._answered, self._last = prompt, False, None
        texts: list[str] = []
        try:
            with self._client.stream_chat(self._messages(prompt), **self._options) as stream:
                for delta in stream:
                    texts.append(delta.text)
                    self._screen.show(delta)
                self._last = stream.result()
        finally:
            if texts:
                self._screen.end_answer()
            if answer := "".join(texts):
                self._turns.append((prompt, answer))
                self._answered = True

    def _messages(self, prompt: str) -> list[dict[str, Any]]:
        said = [] if self._system is None else [("system", self._system)]
        for question, answer in self._turns:
            said += [("user", question), ("assistant", answer)]
        said.append(("user", prompt))
        return [{"role": role, "content": content} for role, content in said]

    def _retry(self) -> None:
        if self._asked is None:
            self._screen.note("nothing has been asked yet")
            return
        if self._answered:
            self._turns.pop()
        self._ask(self._asked)

    def _clear(self) -> None:
        self._turns.clear()
        self._asked, self._answered, self._last = None, False, None
        self._screen.note("history deleted")

    def _stats(self) -> None:
        if self._last is None:
            self._screen.note("there is no complete answer yet")
            return
        try:
            report = self._client.speculation()
        except SpecserveError:  # another server without this route: drafters have no names
            report = SpeculationReport(())
        self._screen.note(describe(self._last, report))


def describe(answer: Completion, report: SpeculationReport) -> str:
    """Speed, acceptance and tokens per drafter of an answer, as far as the server reports them."""
    stats = answer.stats
    speculation = stats.speculative_decoding or SpeculativeDecoding()
    said = [f"{answer.usage.completion_tokens} tokens"]
    if stats.tokens_per_second is not None:
        said.append(f"{stats.tokens_per_second:.1f} tokens/s")
    if stats.time_to_first_token_ms is not None:
        said.append(f"the first after {stats.time_to_first_token_ms:.0f} ms")
    if speculation.mean_acceptance_length is not None:
        said.append(f"{speculation.mean_acceptance_length:.2f} tokens per forward pass")
    if speculation.num_draft_tokens:
        accepted, drafted = speculation.num_accepted_draft_tokens, speculation.num_draft_tokens
        said.append(f"{accepted} of {drafted} drafted tokens accepted ({accepted / drafted:.0%})")
    by_drafter = sorted(Counter(answer.drafter_ids).items())
    if by_drafter:
        counts = (f"{report.name_of(drafter_id)} {count}" for drafter_id, count in by_drafter)
        said.append(f"by drafter: {', '.join(counts)}")
    return "; ".join(said)
