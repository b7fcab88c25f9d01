#!/bin/sh
# Takes the ELF vmlinux out of a bzImage: `vmlinux.sh BZIMAGE VMLINUX`. Fields of the setup header
# as in Documentation/arch/x86/boot.rst: the payload lies behind the setup sectors at
# payload_offset, payload_length long, and ends with its unpacked size, 4 bytes.
set -eu
image=$1 vmlinux=$2
field() { od -An -v -t "u$2" -j "$1" -N "$2" "$image" | tr -d ' '; }
[ "$(dd if="$image" bs=1 skip=514 count=4 2>/dev/null)" = HdrS ] || {
    echo "vmlinux.sh: $image is not a bzImage" >&2
    exit 1
}
sectors=$(field 497 1)
[ "$sectors" -ne 0 ] || sectors=4
start=$(((sectors + 1) * 512 + $(field 584 4)))
length=$(($(field 588 4) - 4))
case $(od -An -v -t x1 -j "$start" -N 4 "$image" | tr -d ' ') in
    02214c18) unpack='lz4 -dc' ;;
    28b52ffd) unpack='zstd -dc' ;;
    fd377a58) unpack='xz -dc' ;;
    1f8b*) unpack='gzip -dc' ;;
    7f454c46) unpack=cat ;;
    *) echo "vmlinux.sh: $image: unknown compression" >&2 && exit 1 ;;
esac
tail -c "+$((start + 1))" "$image" | head -c "$length" | $unpack >"$vmlinux.new"
size=$(field $((start + length)) 4)
[ "$(wc -c <"$vmlinux.new")" -eq "$size" ] || {
    echo "vmlinux.sh: $image unpacked is not as long as it says ($size bytes)" >&2
    exit 1
}
mv "$vmlinux.new" "$vmlinux"
