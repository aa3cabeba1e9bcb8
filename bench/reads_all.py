"""An application that reads every request and answers it, for some of the measures."""

from flask import Flask, request

app = Flask(__name__)


@app.before_request
def answer() -> str:
    """Read the body; answer as `/` of app.py does."""
    request.get_data()
    return "Hello, world!\n"
