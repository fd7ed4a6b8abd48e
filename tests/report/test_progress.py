import io

from rich.console import Console

from openril.report.progress import ProgressDisplay, duration, figures, rate_text, say, time_parts

ROW = {
    "step": 3,
    "train/loss": 0.0123,
    "train/reward": 0.75,
    "reward/student_similarity": 0.25,
    "reward/student_answer": 0.5,
    "discriminator/accuracy": 0.875,
    "train/unknown_reward_share": 0.0,
    "time/step": 10.0,
    "time/sampling": 6.0,
    "time/update": 3.0,
    "time/rewards": 0.01,
}


def plain(**settings):
    return Console(file=io.StringIO(), width=60, **settings)


def at_times(progress, *times):
    """Let the display read these times, in seconds, one for each call."""
    clock = iter(times)
    progress._clock = lambda: next(clock)
    return progress


def test_a_log_line_is_one_line_however_narrow_the_console_is():
    console = plain()
    with ProgressDisplay(console, "train") as progress:
        progress.report(3, 20, ROW)
    (line,) = console.file.getvalue().splitlines()
    assert line.startswith("train 3/20")
    assert "similarity=0.250" in line and "D_accuracy=0.875" in line and "sampling 60%" in line


def test_a_log_file_gets_the_first_line_the_last_and_one_every_few_seconds():
    console = plain()
    progress = at_times(ProgressDisplay(console, "train", every=10), 0, 4, 9, 12, 15, 16)
    for step in range(1, 7):
        progress.report(step, 6, {})
    # 12 is the first report ten seconds after 0, and 6/6 the last one
    assert [line.split()[1] for line in console.file.getvalue().splitlines()] == ["1/6", "4/6", "6/6"]


def test_each_name_has_its_own_lines_rate_and_state():
    console = plain()
    progress = at_times(ProgressDisplay(console, every=1), 0, 0, 2, 4)
    progress.show("a", 10, 30)
    progress.show("b", 0)
    progress.show("a", 14, 30, state="3 in flight")
    progress.show("b", 2)
    # a: 4 units in 2 s, 16 left; b: 2 units in 4 s, of an unknown number
    assert console.file.getvalue().splitlines() == [
        "a 10/30",
        "b 0",
        "a 14/30  3 in flight  2.0/s  left 8 s",
        "b 2  30/min",
    ]


def test_transient_work_that_is_quick_prints_nothing():
    console = plain()
    progress = at_times(ProgressDisplay(console, transient=True, every=5), 0, 3, 7)
    progress.show("reading", 0, 2)
    progress.show("reading", 2, 2)
    assert console.file.getvalue() == ""
    progress.show("reading", 2, 2)
    assert console.file.getvalue().startswith("reading 2/2")


def test_only_the_first_process_of_a_launcher_shows_anything(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert not ProgressDisplay(plain()).enabled
    monkeypatch.setenv("RANK", "0")
    assert ProgressDisplay(plain()).enabled


def test_bars_of_several_names_are_drawn_and_removed():
    console = plain(force_terminal=True)
    with ProgressDisplay(console) as progress:
        progress.show("teacher [a]", 1, 4, state="2 in flight")
        progress.show("teacher b", 3, 4, left=61.0)
        progress._live.refresh()
        progress.remove("teacher b")
        assert len(progress._columns.tasks) == 1
    text = console.file.getvalue()
    assert "teacher [a]" in text and "2 in flight" in text and "left 61 s" in text


def test_a_terminal_shows_bar_and_figures():
    console = plain(force_terminal=True)
    with ProgressDisplay(console, "train") as progress:
        progress.report(3, 20, ROW)
    assert "3/20" in console.file.getvalue() and "0.875" in console.file.getvalue()


def test_a_disabled_display_prints_nothing():
    console = plain()
    with ProgressDisplay(console, "train", enabled=False) as progress:
        progress.report(3, 20, ROW)
        progress.warn("D is at chance")
        progress.note("4 of 8 responses")
    assert console.file.getvalue() == ""


def test_warnings_are_not_read_as_markup():
    console = plain()
    ProgressDisplay(console, "train").warn("set [discriminator] again")
    assert "set [discriminator] again" in console.file.getvalue()


def test_figures_come_in_a_fixed_order_and_only_where_there_is_a_value():
    assert [label for label, _ in figures(ROW)] == ["loss", "reward", "similarity", "answer", "D accuracy"]
    assert ("unknown", "25%") in figures({"train/unknown_reward_share": 0.25})


def test_time_parts_are_shares_of_the_step_largest_first():
    assert time_parts(ROW) == "10.0 s (sampling 60%, update 30%)"
    assert time_parts({"loss": 1.0}) == ""


def test_time_left_follows_the_time_between_reports():
    console = plain()
    progress = at_times(ProgressDisplay(console, "train", every=0), 0.0, 2.0, 6.0)
    for step in (1, 2, 3):
        progress.report(step, 13, {})
    # 10 steps left, (2 + 4) / 2 = 3 s each
    assert console.file.getvalue().splitlines()[-1].endswith("left 30 s")


def test_rates_choose_their_unit_of_time():
    assert [rate_text(r) for r in (1234.5, 2.44, 0.2, 1 / 60, 0.001)] == [
        "1,234/s",
        "2.4/s",
        "12/min",
        "1.0/min",
        "3.6/h",
    ]


def test_durations():
    assert [duration(s) for s in (9, 180, 7500, 100 * 3600)] == ["9 s", "3 min", "2 h 05", "4 d 4 h"]


def test_brackets_and_long_lines_are_printed_as_they_are() -> None:
    console = Console(file=io.StringIO(), width=40)
    text = "all results of this run are in runs/[lr=1e-5] x/[bold]/" + 60 * "y"
    say(console, text)
    assert console.file.getvalue() == text + "\n"  # type: ignore[attr-defined]
