"""The demonstration: one shared enclave against one enclave for each program.

_run      prepares image, broker and programs, and leads them through the phases
client    one of the programs (``python -m teemate.demo.client``): a stranger to the others
_vault    what a program does inside the enclave
_memory   what /proc says about memory
_figures  the result
"""
