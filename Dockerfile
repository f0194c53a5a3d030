# specserve on CPUs. README.md, "Containers", says how to build and run it.
FROM python:3.11-slim AS build
RUN apt-get update && apt-get install --yes --no-install-recommends g++
RUN python -m venv /opt/specserve
ENV PATH=/opt/specserve/bin:$PATH PIP_NO_CACHE_DIR=1
WORKDIR /source
COPY constraints.txt .
RUN pip install -c constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu torch
COPY . .
RUN pip install -c constraints.txt .

FROM python:3.11-slim
COPY --from=build /opt/specserve /opt/specserve
ENV PATH=/opt/specserve/bin:$PATH
RUN useradd --create-home specserve
USER specserve
RUN mkdir /home/specserve/.cache
EXPOSE 8000
HEALTHCHECK --start-period=3m CMD ["python", "-c", "from specserve import Client; raise SystemExit(not Client().health())"]
ENTRYPOINT ["specserve", "serve", "--host", "0.0.0.0"]
