# To be sourced by scripts: runs steps, and prints their times at the end, also if one fails.

step_times=()
step_running=

# step COMMAND...: runs a command, records its time, and returns its status.
step() {
  local begin=$SECONDS status=0 note=
  # At most 100 characters, however many arguments there are.
  step_running=$*
  step_running=${step_running:0:100}
  step_began=$begin
  printf '\n== %s\n' "$step_running"
  "$@" || status=$?
  [ "$status" = 0 ] || note=': failed'
  step_times+=("$(printf '%6d s  %s%s' $((SECONDS - begin)) "$step_running" "$note")")
  step_running=
  return "$status"
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
