"""What every other package needs, and that knows nothing of models.

options: one definition of an option, for command line, signature, documentation and record
progress: bars on a terminal, lines now and then elsewhere
files: one writer for each output, which has its name only when it is complete
endings: how a command ends, by a signal, a closed output, an error of other code
tables: tables for people
provenance: versions, commit, hashes and times of a result
machine: memory, cores, GPUs, and how fast these compute
products: torch's matrix products on a CPU that is not Intel's
cards: GPUs by name
children: a module of the package in a child process
private: what other libraries keep to themselves and we need, with the reasons
"""
