"""The command line: commands made of public functions, and what they print for people.

app: the commands by name, and the one place where errors end
building: a click command of a function
make: what plan, extend, convert, quantize and imatrix print
prove: what inspect, repair, certify and card print
evaluate: the evaluation commands
export: the commands that ready a file for other programs
run: the commands run and models
ask: the commands ask, chat and documents
serve: the command serve
"""
