#!/bin/sh
# Runs an nvcc command and keeps what it says beside the object, as <object>.log: registers, spills
# and serialised products of each kernel, and the seconds it took (tests/cuda reads them). Shows what
# deserves attention only: errors, warnings and performance notes of ptxas, "(C75..)".
object=
previous=
for argument; do
  [ "$previous" = -o ] && object=$argument
  previous=$argument
done
[ -n "$object" ] || exec "$@"

begin=$(date +%s%N)
"$@" 2>"$object.log"
status=$?
milliseconds=$((($(date +%s%N) - begin) / 1000000))
echo "compile time: $milliseconds ms" >>"$object.log"
grep -v -e '^ptxas info *: [^(]' -e '^ *[0-9]* bytes stack frame' -e '^$' -e '^compile time' \
  "$object.log" >&2
echo "nvcc $(basename "$object" .o): $milliseconds ms"
exit $status
