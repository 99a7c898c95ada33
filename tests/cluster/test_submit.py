"""How a submitted job is followed when its connection is not what it should be."""

from collections.abc import AsyncIterator

import pytest
from ray.job_submission import JobStatus

from cluster import submit
from configs.errors import UserError


class Dashboard:
    """Answers each request for the log with the next of `answers`: chunks, the last of which may be an error; and "" = silence."""

    def __init__(self, answers: list[list[str | Exception]], statuses: list[JobStatus | Exception] | None = None) -> None:
        self._answers, self._statuses = iter(answers), iter(statuses or [JobStatus.SUCCEEDED])

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        for chunk in next(self._answers):
            if isinstance(chunk, Exception):
                raise chunk
            if not chunk:
                await submit.asyncio.Event().wait()
            yield chunk

    def get_job_status(self, job: str) -> JobStatus:
        status = next(self._statuses)
        if isinstance(status, Exception):
            raise status
        return status


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "_PAUSE", 0.0)


BROKEN = RuntimeError("WebSocket connection closed unexpectedly with close code 1006")


def follow(dashboard: Dashboard) -> None:
    submit.asyncio.run(submit._follow(dashboard, "http://head:8265", "job-7"))


@pytest.mark.parametrize("reason", [BROKEN, ConnectionResetError("gone"), submit.ClientError("proxy")])
def test_a_log_that_breaks_off_is_followed_again_and_no_line_is_shown_twice(
    reason: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    follow(Dashboard([["a\nb\n", "c\n", reason], [reason], ["a\n", reason], ["a\n", "b\nc\nd\n", "e\n"]]))
    assert capsys.readouterr().out == "a\nb\nc\nd\ne\n"


def test_a_log_that_ends_before_its_job_is_followed_again(capsys: pytest.CaptureFixture[str]) -> None:
    follow(Dashboard([["a\n"], ["a\nb\n"]], [JobStatus.RUNNING, JobStatus.FAILED]))
    assert capsys.readouterr().out == "a\nb\n"


def test_a_connection_that_fell_silent_is_made_again(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(submit, "_SILENCE", 0.5)
    follow(Dashboard([["a\n", ""], ["a\nb\n"]], [JobStatus.SUCCEEDED] * 2))  # it ended meanwhile
    assert capsys.readouterr().out == "a\nb\n"


def test_a_connection_that_is_lost_for_good_says_that_the_job_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    many = submit._TRIES
    with pytest.raises(UserError, match=r"job job-7 goes on.*ray job logs --address http://head:8265 --follow job-7"):
        follow(Dashboard([["a\n", BROKEN], *[[BROKEN]] * (many - 1), ["a\nb\n", BROKEN], *[[BROKEN]] * many]))
    assert capsys.readouterr().out == "a\nb\n"


def test_a_job_that_is_silent_for_long_is_followed_as_long_as_its_head_answers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(submit, "_SILENCE", 0.01)
    many = 2 * submit._TRIES
    follow(Dashboard([*[[""]] * many, ["a\n"]], [*[JobStatus.PENDING] * many, JobStatus.SUCCEEDED]))
    assert capsys.readouterr().out == "a\n"
