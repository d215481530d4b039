"""Campaigns that users can run on their hosts; for now the storm, a campaign of faults.

_storm    leads: starts a broker and programs, kills them at random moments, counts and checks
worker    the programs (``python -m teemate.bench.worker``): each works in the shared vault until it is killed
_journal  what a program was about to do and what it knows is done, in memory that outlives it
_where    what a program was doing at the moment of its death
_broker   the broker under its keeper, and its log
_figures  the result
"""
