"""The students and teachers of the fourteen skills, trained from random weights.

``python -m playground.models`` trains them; ``plan.py`` is the whole plan.
"""
