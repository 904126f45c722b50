"""Airflow DAG that scores the corpus every night, on a Ray cluster that is already running.

Copy this file into the DAG folder. The workers need `ray[default]` in the cluster's version, and its address in
RAY_ADDRESS (http://HEAD:8265); the cluster's nodes need this project (deploy/docker) and the credentials of the store.
Written for Airflow 3.2 or newer.
"""

import time
from datetime import datetime, timedelta

from airflow.sdk import DAG, BaseOperator
from airflow.sdk.exceptions import AirflowException, AirflowFailException

ENTRYPOINT = (
    "trbert-score --input s3://my-bucket/corpus --output s3://my-bucket/scores --model s3://my-bucket/model "
    "--id-column id --stop-after 5h"
)
# Exit codes after which another try would end in the same way. After the others it continues where the last one ended:
# 1, the run failed; 5, another run is at work on the output; none, the cluster lost the job.
FINAL = {
    2: "an option, the input, the model or the output does not fit",
    3: "done, but with unreadable shards or more bad rows than --max-bad-rows",
    4: "stopped before it was complete; the next night's run continues",
}


class ScoreOnRay(BaseOperator):
    """Run a command as a Ray job, and fail as it does."""

    template_fields = ("entrypoint", "submission_prefix")

    def __init__(self, *, entrypoint: str, submission_prefix: str, poll_seconds: float = 30, **kwargs):
        super().__init__(**kwargs)
        self.entrypoint = entrypoint
        self.submission_prefix = submission_prefix
        self.poll_seconds = poll_seconds
        self._submission: str | None = None

    def execute(self, context):
        from ray.job_submission import JobSubmissionClient  # not when Airflow reads the DAG: it takes seconds

        client = JobSubmissionClient()
        self._submission = self._at_work(client)
        while not (job := client.get_job_info(self._submission)).status.is_terminal():
            time.sleep(self.poll_seconds)
        self.log.info("%s", client.get_job_logs(self._submission)[-50_000:])
        code = job.driver_exit_code
        if code in FINAL:
            raise AirflowFailException(f"exit code {code}: {FINAL[code]}")
        if code != 0:
            raise AirflowException(f"{self._submission} ended with exit code {code}: {job.message}")

    def _at_work(self, client) -> str:
        """The job of this DAG run that is at work, or a new one: a worker that died left its job running."""
        jobs = [job for job in client.list_jobs() if (job.submission_id or "").startswith(self.submission_prefix)]
        for job in jobs:
            if not job.status.is_terminal():
                return job.submission_id
        return client.submit_job(entrypoint=self.entrypoint, submission_id=f"{self.submission_prefix}-{len(jobs) + 1}")

    def on_kill(self):
        """Stop the job (SIGTERM: what is complete is committed) if the task is stopped or takes too long."""
        from ray.job_submission import JobSubmissionClient

        if self._submission is not None:
            JobSubmissionClient().stop_job(self._submission)


with DAG(
    "nightly_scoring",
    description="Score new and rewritten shards with TR-BERT",
    schedule="0 23 * * *",
    start_date=datetime(2026, 11, 1),
    catchup=False,  # a run scores whatever is new, so nights that were missed need no runs of their own
    max_active_runs=1,
    dagrun_timeout=timedelta(hours=8),
    tags=["trbert"],
):
    ScoreOnRay(
        task_id="score",
        entrypoint=ENTRYPOINT,
        submission_prefix="nightly-{{ ts_nodash }}",
        retries=3,
        retry_delay=timedelta(minutes=5),
        # --stop-after ends a run in order; this is for one that does not end.
        execution_timeout=timedelta(hours=6),
    )
