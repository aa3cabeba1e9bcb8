# The form that many tutorials show, for docs/walkthrough.md. It works. Do not ship it.
FROM python:3.14-slim
WORKDIR /app
COPY . .
RUN pip install -r requirements.in
CMD ["flask", "--app", "app", "run", "--debug", "--host=0.0.0.0"]
