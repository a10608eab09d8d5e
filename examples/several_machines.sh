#!/usr/bin/env bash
# One study, many machines. The database is all that they share; files go through the folder or bucket of --artifacts.
#
#   export NAS_KD_STORAGE=postgresql+psycopg://me:password@db/nas    # on every machine
#   ./several_machines.sh study STORE                                # once: trains the teacher, searches, makes the report
#   ./several_machines.sh worker                                     # anywhere: waits for the study, then trains trials
set -euo pipefail

case "$1" in
    study) nas-kd study --budget params=1M --study-name shared --artifacts "${@:2}" ;;
    worker) nas-kd worker --study-name shared --wait 3600 "${@:2}" ;;
esac
