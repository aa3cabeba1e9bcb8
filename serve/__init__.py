"""A WSGI server for containers, built on parts of waitress. Run it with `python -m serve`.

waitress reads the settings, parses headers and calls the application. The event loop, stricter parsing, timeouts,
draining and logs are ours.

Read it in this order: settings, log, http (requests), response, channel (connections), server (the event loop and
draining), __main__ (startup).
"""
