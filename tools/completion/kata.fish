# Completion in fish for kata and its other programs. The program itself says what may stand where the cursor is
# (src/kata/cli/complete.py), so this knows none of its commands.
function __kata_complete
    set -l words (commandline -opc)
    set -l word (commandline -ct)
    for line in ($words[1] __complete words $words[2..-1] "$word" 2>/dev/null)
        switch $line
            case :files
                __fish_complete_path (string replace -r '^--[^=]*=' '' -- $word)
            case '*'
                echo $line
        end
    end
end
complete -c kata -f -a '(__kata_complete)'
complete -c kata-agent-ctl -f -a '(__kata_complete)'
complete -c kata-log-parser -f -a '(__kata_complete)'
complete -c kata-monitor -f -a '(__kata_complete)'
complete -c kata-runtime -f -a '(__kata_complete)'
