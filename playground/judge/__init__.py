"""The judge of the fourteen skills: a small text model that reads the judge's prompt and writes a verdict.

``python -m playground.judge --out FOLDER`` trains it from the exact rule's verdicts; ``--measure FOLDER`` measures one.
"""
