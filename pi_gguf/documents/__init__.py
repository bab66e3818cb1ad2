"""Documents of people: read from their files, cut into passages, and found again in what a model quotes.

formats: a file or standard input to `Document`, its text with pages, chapters and headings
markup: HTML
archives: docx and epub
apart: a stranger's document, read in a process of its own
quotes: what an answer quotes, and where in the document that stands
"""
