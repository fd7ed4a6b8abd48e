"""The study: RIL compared with what it is built from, on two students, with seeds, intervals and ablations.

``python -m playground.study --out runs/study`` runs it; ``--report`` writes tables, figures and the page from the
finished cells. plan.py lists the cells, recipes.py makes their recipes, jobs.py orders them and work.py runs one of them.
scores.py, bootstrap.py, findings.py, tables.py, figures.py and page.py turn run folders into the report.
"""
