# The second form of the tutorial: it copies everything, then installs, so that each edit installs again.
ARG PYTHON_IMAGE
FROM ${PYTHON_IMAGE}
WORKDIR /app
COPY . .
RUN pip install -r requirements.txt
CMD ["flask", "--app", "app", "run", "--debug", "--host=0.0.0.0"]
