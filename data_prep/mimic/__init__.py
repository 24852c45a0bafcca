"""Patients and reports of MIMIC."""
