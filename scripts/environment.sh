# Sourced by the other scripts, from the root of the checkout: a virtual environment with the locked versions.
#   DUDE_VENV    where it lies (default .venv)
#   DUDE_PYTHON  the interpreter it is made with (default python3)
venv="${DUDE_VENV:-.venv}"
constraints=requirements.lock
if [ ! -x "$venv/bin/python" ]; then
    echo "setting up $venv"
    "${DUDE_PYTHON:-python3}" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --upgrade "pip>=25.1"
fi
PATH="$(cd "$venv" && pwd)/bin:$PATH"
# Compiled is what is imported, when it is imported, whatever the shell says: of 19,000 files the tests need some.
export PYTHONDONTWRITEBYTECODE=
install() {
    python -m pip install --quiet --no-compile --disable-pip-version-check --constraint "$constraints" "$@"
}
