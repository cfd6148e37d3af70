-- Run once, on an empty data folder, in the database `prefect`. Prefect searches names with trigram indexes.
CREATE EXTENSION IF NOT EXISTS pg_trgm;
CREATE DATABASE mlflow;
