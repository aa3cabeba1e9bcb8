"""Runs a WSGI application under waitress as a container should be run: `python -m serve`.

Read it in this order: __main__ (what happens), settings, server (the loop, and how it ends), connection, request,
answer (waitress's classes, and what is changed in each), log.
"""
