"""Write a student in the formats of other runtimes, and check that it still answers the same there."""
