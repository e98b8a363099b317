"""New ids: a prefix that says what they name, and random hex digits."""

from __future__ import annotations

from secrets import token_hex

from polygraft.cluster.model import FileId, JobId, StudyId


def new_job_id() -> JobId:
    return JobId(f"ftjob-{token_hex(12)}")


def new_file_id() -> FileId:
    return FileId(f"file-{token_hex(12)}")


def new_study_id() -> StudyId:
    return StudyId(f"study-{token_hex(12)}")
