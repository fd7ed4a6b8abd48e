"""The paper's fourteen benchmarks, with lmms-eval's tasks and this project's student, journal and judge."""
