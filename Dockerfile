# The trained recommender as a web service: CPU, one process, not root, with a health check.
#
#   docker build --build-arg PIP_EXTRA_INDEX_URL=<an index with CPU builds of torch> -t recsys .
#   docker run -p 8000:8000 recsys                      # trains on embedded data, then serves
#   docker run -p 8000:8000 recsys --data ml-100k
#
# Probes of an orchestrator: /health restarts the container, /ready sends it requests.
FROM python:3.12-slim-bookworm

ENV PYTHONUNBUFFERED=1 \
    OMP_NUM_THREADS=1 \
    OMP_WAIT_POLICY=passive

WORKDIR /app

# first what seldom changes; the CPU build of torch, or the image would be 5 GB larger
ARG PIP_EXTRA_INDEX_URL
COPY pyproject.toml constraints.txt ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > requirements.txt \
    && pip install --no-cache-dir -c constraints.txt -r requirements.txt \
    && python -c "import torch; assert torch.version.cuda is None, 'not a CPU build: see the first lines'"

RUN useradd --no-log-init --create-home --uid 10001 kata && chown kata /app
USER 10001:10001
COPY --chown=10001:10001 . .

EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=15m --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=2)"]
# exec form: the server itself gets SIGTERM, and answers what it has taken before it stops
ENTRYPOINT ["python", "-m", "harness.serve", "--host", "0.0.0.0"]
