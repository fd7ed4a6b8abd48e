"""The headline study: RIL against what it is built from, on two students, with seeds, intervals and ablations.

``python -m playground.study --out runs/study`` runs it; ``--report`` makes tables, figures and page of what is
there. plan.py says what is run, work.py runs one job, lanes.py two at a time; scores.py, statistics.py, findings.py,
tables.py, figures.py and page.py turn run folders into the report.
"""
