"""Benchmarks and campaigns that users can run on their hosts.

Figures, each compared with its like in the same run:

_run      the benchmarks by name; their modules are _floor, _attach, _call, _memory, _scale, _churn and _db
_rows     a figure, what it is compared with, and the targets
_setting  images, brokers and programs for a benchmark
_measured the programs that are measured, and how they take turns
subject   one of them (``python -m teemate.bench.subject``); others are native/bench and :mod:`crowd`
crowd     many clients in one program
_plot     pictures

The storm, a campaign of faults:

_storm    leads: starts a broker and programs, kills them at random moments, counts and checks
worker    the programs (``python -m teemate.bench.worker``): each works in the shared vault until it is killed
_journal  what a program was about to do and what it knows is done, in memory that outlives it
_where    what a program was doing at the moment of its death
_figures  the result

_broker   the broker of either, and its log
"""
