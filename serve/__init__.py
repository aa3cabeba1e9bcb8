"""Runs a WSGI application with waitress's parts, as a container should be run: `python -m serve`.

From waitress come its settings, the parsing of headers, the call of the application. Ours are the loop, strictness,
how long clients are waited for, the drain and the logs.

Read it in this order: settings, log, http (a request), response, channel (a connection), server (the loop and the
drain), __main__ (the start).
"""
