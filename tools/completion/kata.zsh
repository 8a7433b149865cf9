#compdef kata kata-agent-ctl kata-log-parser kata-monitor kata-runtime
# Completion in zsh for kata and its other programs. The program itself says what may stand where the cursor is
# (src/kata/cli/complete.py), so this knows none of its commands.
_kata() {
    local line text about files
    local -a closed open
    for line in "${(@f)$("${(Q)words[1]}" __complete words "${(@Q)words[2,CURRENT-1]}" "${(Q)PREFIX}" 2>/dev/null)}"; do
        text=${line%%$'\t'*}
        about=${${line#"$text"}#$'\t'}
        case $text in
            ('') ;;
            (:files) files=yes ;;
            (*[:.=]) open+=("${text//:/\\:}:$about") ;;
            (*) closed+=("${text//:/\\:}:$about") ;;
        esac
    done
    (( $#closed )) && _describe -t values value closed
    (( $#open )) && _describe -t values value open -S ''
    if [[ -n $files ]]; then
        compset -P '--[^=]##='
        _files
    fi
}
_kata "$@"
