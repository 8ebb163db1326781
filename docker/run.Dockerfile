# Runs exported files, without torch: docker build -f docker/run.Dockerfile -t cflow-plugin .
#   docker run -v /data:/data cflow-plugin watch --model /data/model.xml --source /data/in --output /data/out --follow true
FROM python:3.13-slim
RUN --mount=type=bind,target=/source,rw \
    pip install --no-cache-dir --no-deps /source && pip install --no-cache-dir -r /source/runtime.txt
RUN useradd --create-home --uid 1000 cflow
USER 1000
WORKDIR /home/cflow
ENTRYPOINT ["cflow-plugin"]
