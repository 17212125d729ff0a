"""Studies, their records and their pages. Run from the repository root: python -m results.NAME"""
