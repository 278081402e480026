# CPUs: docker build -t r1engine . && docker run --rm -it r1engine
# Building runs the first command of the README, `make demo`: it sets up .venv and shows that the engine works here.
# The container runs the second one, `make test`. Code rewards need namespaces, which Docker keeps back: for them add
# --security-opt seccomp=unconfined --security-opt systempaths=unconfined, and ask `r1engine doctor`.
# For GPUs docs/gpu.md has the packages. Not yet built by a Docker daemon: there was none where it was written.
FROM python:3.11-slim-bookworm
RUN apt-get update \
    && apt-get install -y --no-install-recommends bubblewrap g++ git make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /r1engine
COPY . .
RUN make demo
CMD ["make", "test"]
