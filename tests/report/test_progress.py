import io

from rich.console import Console

from openril.report.progress import StageProgress, duration, figures, time_parts

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


def test_a_log_file_gets_one_whole_line_a_step_however_narrow_it_is():
    console = plain()
    with StageProgress(console, "train") as progress:
        progress.report(3, 20, ROW)
        progress.report(4, 20, ROW)
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("train 3/20")
    assert "similarity=0.250" in lines[0] and "D_accuracy=0.875" in lines[0] and "sampling 60%" in lines[0]


def test_a_terminal_shows_bar_and_figures():
    console = plain(force_terminal=True)
    with StageProgress(console, "train") as progress:
        progress.report(3, 20, ROW)
    assert "3/20" in console.file.getvalue() and "0.875" in console.file.getvalue()


def test_a_disabled_display_prints_nothing():
    console = plain()
    with StageProgress(console, "train", enabled=False) as progress:
        progress.report(3, 20, ROW)
        progress.warn("D is asleep")
    assert console.file.getvalue() == ""


def test_warnings_are_not_read_as_markup():
    console = plain()
    StageProgress(console, "train").warn("set [discriminator] again")
    assert "set [discriminator] again" in console.file.getvalue()


def test_figures_come_in_a_fixed_order_and_only_where_there_is_a_value():
    assert [label for label, _ in figures(ROW)] == ["loss", "reward", "similarity", "answer", "D accuracy"]
    assert ("unknown", "25%") in figures({"train/unknown_reward_share": 0.25})


def test_time_parts_are_shares_of_the_step_largest_first():
    assert time_parts(ROW) == "10.0 s (sampling 60%, update 30%)"
    assert time_parts({"loss": 1.0}) == ""


def test_time_left_follows_the_time_between_reports():
    console = plain()
    progress = StageProgress(console, "train")
    times = iter([0.0, 2.0, 6.0])
    progress._clock = lambda: next(times)
    for step in (1, 2, 3):
        progress.report(step, 13, {})
    # 10 steps left, (2 + 4) / 2 = 3 s each
    assert console.file.getvalue().splitlines()[-1].endswith("left 30 s")


def test_durations():
    assert [duration(s) for s in (9, 180, 7500, 100 * 3600)] == ["9 s", "3 min", "2 h 05", "4 d 4 h"]
