"""What is written to MLflow and read from it; the one door to mlflow."""
