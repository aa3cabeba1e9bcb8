# What most tutorials show: one stage, the development server with its debugger.
ARG PYTHON_IMAGE
FROM ${PYTHON_IMAGE}
WORKDIR /app
COPY requirements.txt .
RUN pip install -r requirements.txt
COPY . .
CMD ["flask", "--app", "app", "run", "--debug", "--host=0.0.0.0"]
