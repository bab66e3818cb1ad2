"""A GGUF file for many at a time: OpenAI's API, and a page for long documents. Needs the extra `serve`.

protocol: what clients may ask, and errors in OpenAI's form
tools: tools for a template, and calls out of a text
answers: what the engine tells, in OpenAI's form
wire: JSON and events on their way, and clients that go away
talk: the endpoints that write
responses: `/v1/responses`
shelf: the endpoints of documents
markdown: Markdown that a model wrote, as HTML that a page may show
guard: who may ask, and what every answer carries
metrics: figures for Prometheus
description: OpenAPI
app: `create_app`, what is answered at which address
serve: the command

The page is in the folder desk: its style and modules, written by hand, served as they are.
"""
