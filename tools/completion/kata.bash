# shellcheck shell=bash
# Completion in bash for kata and its other programs. The program itself says what may stand where the cursor is
# (src/kata/cli/complete.py), so this knows none of its commands.
_kata() {
    local line=${COMP_LINE:0:COMP_POINT} candidate files='' word piece front
    word=${line##*[[:space:]]}
    # Of a word with colons or equals signs readline replaces what follows the last of them.
    piece=$word
    if [[ $COMP_WORDBREAKS == *:* ]]; then piece=${piece##*:}; fi
    if [[ $COMP_WORDBREAKS == *=* ]]; then piece=${piece##*=}; fi
    front=${word%"$piece"}
    COMPREPLY=()
    while IFS=$'\t' read -r candidate _; do
        case $candidate in
            :files) files=yes ;;
            *) COMPREPLY+=("${candidate#"$front"}") ;;
        esac
    done < <("$1" __complete line "$line" 2>/dev/null)
    if [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *[:.=] ]]; then compopt -o nospace; fi
    if [[ $files ]]; then
        if ((${#COMPREPLY[@]} == 0)); then compopt -o filenames; fi
        while IFS= read -r candidate; do COMPREPLY+=("$candidate"); done < <(compgen -f -- "$piece")
    fi
}
complete -F _kata kata kata-agent-ctl kata-log-parser kata-monitor kata-runtime
