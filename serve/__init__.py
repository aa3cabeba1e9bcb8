"""Runs a WSGI application under waitress as a container should be run: `python -m serve`.

From waitress: its settings, the parsing of headers, the call of the application, the threads. Ours: the loop, how long
clients are waited for, the drain, strictness, logs.

Read it in this order: settings, log, http (a request), response, channel (a connection), server (the loop and the
drain), __main__ (the start).
"""
