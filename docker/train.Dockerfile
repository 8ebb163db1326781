# Trains and exports: docker build -f docker/train.Dockerfile -t cflow-plugin-train .
#   docker run --gpus all --shm-size 2g -v /data:/data -w /data cflow-plugin-train train --model CflowPlugin --data …
FROM python:3.13-slim
RUN --mount=type=bind,target=/source,rw pip install --no-cache-dir "/source[demo]"
RUN useradd --create-home --uid 1000 cflow
USER 1000
WORKDIR /home/cflow
ENTRYPOINT ["anomalib"]
