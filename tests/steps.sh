# For scripts to source: steps whose times are printed at the end, also where one fails.

step_times=()
step_running=

# step COMMAND...: runs it.
step() {
  local begin=$SECONDS
  # One line, however many arguments there are.
  step_running=$*
  step_running=${step_running:0:100}
  step_began=$begin
  printf '\n== %s\n' "$step_running"
  "$@"
  step_times+=("$(printf '%6d s  %s' $((SECONDS - begin)) "$step_running")")
  step_running=
}

print_steps() {
  local status=$?
  [ -z "$step_running" ] || step_times+=("$(printf '%6d s  %s: failed' $((SECONDS - step_began)) "$step_running")")
  printf '\n== times\n'
  printf '%s\n' "${step_times[@]}"
  printf '%6d s  in all\n' "$SECONDS"
  return "$status"
}
trap print_steps EXIT
